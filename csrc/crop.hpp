// CPU kernels of the shared crop, resize, flip and roll of each segment, where the resize does not shrink, and its adjoint.
#pragma once

#include <cstdint>
#include <vector>

namespace fd2fast::crop {

enum class Type { float32 = 0, bfloat16 = 1 };

// An [N, C, height, width] tensor by strides, in elements.
struct Images {
    std::int64_t height, width;
    std::int64_t stride[4];
};

// The crop of one segment and where its pixels go.
struct Draw {
    std::int64_t top, left, height, width;
    bool flip;
    std::int64_t down, right;
};

struct Batch {
    Type type, view_type;                 // of the images and of the views
    std::int64_t channels, size;          // of the views [N, C, size, size]
    std::vector<std::int64_t> segments;   // row offsets [S + 1]
    std::vector<Draw> draws;              // [S]
    int threads;
};

// Throws std::invalid_argument for a crop that is empty, leaves the images or is larger than the view.
void check(const Batch& batch, const Images& images);

// view[o] = (1 - w) crop[i] + w crop[i + 1] along both axes, with i + w = max(scale (p(o) + .5) - .5, 0) held within the crop,
// scale = length / size, p the pixel before roll and flip. Any number of threads gives the same values.
void forward(const Batch& batch, const Images& images, const void* image, const Images& views, void* view);

// The images' gradient, all of it written: 0 outside the crops.
void backward(const Batch& batch, const Images& views, const void* grad, const Images& images, void* grad_image);

}  // namespace fd2fast::crop
