// 3 x 3 convolutions with stride 1 by Winograd's minimal filtering F(4 x 4, 3 x 3); maps are channels-last.
#pragma once

#include <cstdint>
#include <vector>

#include "frozen.hpp"

namespace fd2fast::winograd {

using frozen::Type;

// Values of one tile: 4 x 4 outputs are made from 6 x 6 inputs by 36 products a channel pair in place of 144.
constexpr std::int64_t tile_outputs = 4, tile_inputs = 6, positions = 36;

struct Shape {
    std::int64_t images, channels_in, channels_out;
    std::int64_t height, width;          // of the input
    std::int64_t out_height, out_width;  // height + 2 padding - 2
    std::int64_t padding[2];             // top and left; below 6
};

// Floats of a transformed weight of these channels on this machine.
std::int64_t packed_floats(std::int64_t channels_in, std::int64_t channels_out);

// y [images, out, channels_out] from x [images, in, channels_in], both of `type`; packed: of `transform_and_pack`; bias may be
// null.
// Arithmetic is in fp32 whatever the type. The result does not depend on the number of threads.
void convolve(Type type, const Shape& shape, const void* x, const float* packed, const float* bias, void* y, int threads);

// A weight [channels_out, channels_in, 3, 3] in fp32 with these strides (floats), transformed, in the order in which the products
// read it. `turned` for the input gradient: filters by 180 degrees, and the weight is [channels_in, channels_out, 3, 3].
void transform_and_pack(const float* weight, const std::int64_t (&strides)[4], std::int64_t channels_in,
                        std::int64_t channels_out, bool turned, float* packed, int threads);

// The weight's gradient in fp32, into [channels_out, channels_in, 3, 3] with these strides, from x and the gradient of y.
// The sums do not depend on the number of threads.
void weight_gradient(Type type, const Shape& shape, const void* x, const void* grad, float* grad_weight,
                     const std::int64_t (&strides)[4], int threads);

}  // namespace fd2fast::winograd
