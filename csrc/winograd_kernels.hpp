// The inner loops behind winograd.hpp, as tables of functions: one for each instruction set and type.
#pragma once

#include <cstdint>

#include "winograd.hpp"

namespace fd2fast::winograd {

// The products of one position: rows [first, end) of a [tiles, channels_in] times packed [channels_in, channels_out].
struct Products {
    std::int64_t channels_in, channels_out;
    const float* a;       // [tiles, channels_in]
    const float* packed;  // of one position
    float* c;             // [tiles, stride]
    std::int64_t stride;
};

// A weight or its gradient, [out, in, 3, 3] by strides.
struct Filters {
    const float* from;
    float* to;
    std::int64_t strides[4];
};

struct Kernels {
    // Lanes of a vector, and vectors side by side in one panel of packed weights.
    int lanes, vectors;
    // Tiles [first, end), counted over all images, into v [positions, rows, channels_in] from row 0 on.
    void (*gather)(const Shape&, std::int64_t first, std::int64_t end, const void* x, const float* zeros, float* v,
                   std::int64_t rows);
    void (*multiply)(const Products&, std::int64_t first, std::int64_t end);
    // m [positions, rows, stride] from row 0 on into the outputs of tiles [first, end).
    void (*scatter)(const Shape&, std::int64_t first, std::int64_t end, const float* m, std::int64_t rows,
                    std::int64_t stride, const float* bias, void* y);
    // Transformed filters of input channel k and `lanes` output channels from `column` on, at `to` + position * step.
    void (*filters)(const Filters&, std::int64_t k, std::int64_t column, std::int64_t channels_out, bool turned, float* to,
                    std::int64_t step);
    // The gradients of the outputs of tiles [first, end) as those of the products, into m [positions, rows, stride].
    void (*spread)(const Shape&, std::int64_t first, std::int64_t end, const void* grad, const float* zeros, float* m,
                   std::int64_t rows, std::int64_t stride);
    // sums [channels_in, stride] += v^T m over `rows` tiles of one position.
    void (*accumulate)(const float* v, const float* m, std::int64_t rows, std::int64_t channels_in, std::int64_t stride,
                       float* sums);
    // The filters' gradient of input channel k from sums [positions, channels_in, stride].
    void (*collect)(const Filters&, const float* sums, std::int64_t k, std::int64_t channels_in, std::int64_t channels_out,
                    std::int64_t stride);
};

namespace base {
const Kernels& kernels(Type type);
}
#ifdef FD2FAST_X86_LEVELS
namespace v3 {
const Kernels& kernels(Type type);
}
namespace v4 {
const Kernels& kernels(Type type);
}
namespace v4_bf16 {
const Kernels& kernels(Type type);
}
#endif

}  // namespace fd2fast::winograd
