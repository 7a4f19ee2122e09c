// The inner loops behind frozen.hpp, as tables of functions: one for each instruction set and type.
#pragma once

#include <cstdint>

#include "frozen.hpp"

namespace fd2fast::frozen {

// Pixels [first, end) of one segment: what one call works on.
struct Chunk {
    std::int64_t segment, first, end, channels;
};

// A map among those that are joined: its channels are [first, first + channels) of the whole.
struct Part {
    const void* map;
    std::int64_t first, channels;
};

struct Kernels {
    // sums [2, channels] of the chunk about the running mean
    void (*forward)(const Chunk&, const BatchNorm&, const void* x, const void* residual, void* y, std::uint8_t* bits,
                    float* sums);
    // slope and offset [channels] of the chunk's segment
    void (*backward)(const Chunk&, const BatchNorm&, const void* x, const void* grad, const std::uint8_t* bits,
                     const float* slope, const float* offset, void* grad_x, void* grad_residual);
    void (*sums)(const Chunk&, const void* x, const float* origin, float* sums);
    void (*affine)(const Chunk&, const void* x, const float* slope, const float* offset, void* out);
    void (*join)(const Chunk&, const BatchNorm&, const Part&, void* y);
    void (*split)(const Chunk&, const BatchNorm&, const Part&, const void* grad, void* out);
    // one row of the output, or of the input, counted over all images
    void (*pool_row)(const Window&, std::int64_t channels, std::int64_t row, const void* x, void* y, std::uint8_t* places);
    void (*unpool_row)(const Window&, std::int64_t channels, std::int64_t row, const void* grad, const std::uint8_t* places,
                       void* grad_x);
    // weight [kernel pixels, channels]
    void (*depthwise_row)(const Window&, std::int64_t channels, std::int64_t row, const void* grad, const float* weight,
                          void* grad_x);
};

// fp32 only, whatever the type of the maps.
struct VectorKernels {
    // |z - c| of one c for every row
    void (*distances)(std::int64_t rows, std::int64_t dims, const float* z, const float* c, float* out, std::int64_t step);
    // dims [first, end) of `pull`
    void (*pull)(std::int64_t rows, std::int64_t classes, std::int64_t dims, std::int64_t first, std::int64_t end,
                 const float* z, const float* prototypes, const float* weights, float* out);
    // one row of unit_root_forward, returning its norm, and of unit_root_backward
    float (*unit_root)(std::int64_t dims, float eps, const float* x, float* z);
    void (*unit_root_grad)(std::int64_t dims, float eps, float norm, const float* x, const float* z, const float* grad,
                           float* grad_x);
};

namespace base {
const Kernels& kernels(Type type);
const VectorKernels& vector_kernels();
}
#ifdef FD2FAST_X86_LEVELS
namespace v3 {
const Kernels& kernels(Type type);
const VectorKernels& vector_kernels();
}
namespace v4 {
const Kernels& kernels(Type type);
const VectorKernels& vector_kernels();
}
namespace v4_bf16 {
const Kernels& kernels(Type type);
const VectorKernels& vector_kernels();
}
#endif

}  // namespace fd2fast::frozen
