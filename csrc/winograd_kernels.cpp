// The inner loops of winograd.cpp; compiled once for each instruction set.
#include "winograd_kernels.hpp"

#include "lanes.hpp"

namespace fd2fast::winograd {
namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16, rows_at_once = 12;
#elif defined(__AVX2__)
constexpr int lanes = 8, rows_at_once = 6;
#else
constexpr int lanes = 4, rows_at_once = 4;
#endif
constexpr int vectors = 2;

// The points of the interpolation are 0, -a, a, -b, b with a^2 = 1/2, b^2 = 2, and infinity: with them the rounding of fp32 is
// half that of the usual 1 and 2, and twice that of the plain sums (measured; models/winograd.py has the weights' side).
constexpr float a = 0.70710678f, b = 1.41421356f, squares = 2.5f;
constexpr float a_cubed = 0.35355339f, b_cubed = 2.82842712f;

template <typename V>
FD2FAST_INLINE void transform_input(const V (&d)[6], V (&t)[6]) {
    const V even_a = d[4] - d[2] * 2.0f, odd_a = (d[3] - d[1] * 2.0f) * a;
    const V even_b = d[4] - d[2] * 0.5f, odd_b = (d[3] - d[1] * 0.5f) * b;
    t[0] = (d[0] + d[4]) - d[2] * squares;
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = (d[1] + d[5]) - d[3] * squares;
}

template <typename V>
FD2FAST_INLINE void transform_output(const V (&m)[6], V (&y)[4]) {
    const V even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + (even_a + even_b);
    y[1] = odd_a * a + odd_b * b;
    y[2] = even_a * 0.5f + even_b * 2.0f;
    y[3] = (odd_a * a_cubed + odd_b * b_cubed) + m[5];
}

struct Tile {
    int64_t image, top, left;  // of its outputs
};

FD2FAST_INLINE Tile tile_at(const Shape& s, int64_t index) {
    const int64_t across = (s.out_width + tile_outputs - 1) / tile_outputs, down = (s.out_height + tile_outputs - 1) / tile_outputs;
    const int64_t place = index % (down * across);
    return {index / (down * across), place / across * tile_outputs, place % across * tile_outputs};
}

template <int W, typename T>
FD2FAST_INLINE void gather_channels(const T* const (&from)[36], int64_t c, float* v, int64_t step) {
    F<W> half[6][6];
    for (int j = 0; j < 6; ++j) {
        F<W> column[6], t[6];
        for (int i = 0; i < 6; ++i) column[i] = load<W>(from[i * 6 + j] + c);
        transform_input(column, t);
        for (int i = 0; i < 6; ++i) half[i][j] = t[i];
    }
    for (int i = 0; i < 6; ++i) {
        F<W> t[6];
        transform_input(half[i], t);
        for (int j = 0; j < 6; ++j) store<W>(v + (i * 6 + j) * step + c, t[j]);
    }
}

template <typename T>
void gather(const Shape& s, int64_t first, int64_t end, const void* source, const float* zeros, float* v, int64_t rows) {
    const int64_t channels = s.channels_in, step = rows * channels;
    const T *x = static_cast<const T*>(source), *none = reinterpret_cast<const T*>(zeros);
    for (int64_t index = first; index < end; ++index) {
        const Tile tile = tile_at(s, index);
        const T* image = x + tile.image * s.height * s.width * channels;
        const int64_t top = tile.top - s.padding[0], left = tile.left - s.padding[1];
        const T* from[36];
        for (int64_t i = 0; i < 6; ++i)
            for (int64_t j = 0; j < 6; ++j) {
                const bool inside = top + i >= 0 && top + i < s.height && left + j >= 0 && left + j < s.width;
                from[i * 6 + j] = inside ? image + ((top + i) * s.width + left + j) * channels : none;
            }
        float* to = v + (index - first) * channels;
        int64_t c = 0;
        for (; c + lanes <= channels; c += lanes) gather_channels<lanes>(from, c, to, step);
        for (; c < channels; ++c) gather_channels<1>(from, c, to, step);
    }
}

template <int W, typename T>
FD2FAST_INLINE void scatter_channels(const float* m, int64_t step, const float* bias, T* const (&to)[16], int64_t c) {
    F<W> half[4][6];
    for (int j = 0; j < 6; ++j) {
        F<W> column[6], t[4];
        for (int i = 0; i < 6; ++i) column[i] = load<W>(m + (i * 6 + j) * step + c);
        transform_output(column, t);
        for (int i = 0; i < 4; ++i) half[i][j] = t[i];
    }
    F<W> added = {};
    if (bias != nullptr) added = load<W>(bias + c);
    for (int i = 0; i < 4; ++i) {
        F<W> t[4];
        transform_output(half[i], t);
        for (int j = 0; j < 4; ++j)
            if (to[i * 4 + j] != nullptr) store<W>(to[i * 4 + j] + c, t[j] + added);
    }
}

template <typename T>
void scatter(const Shape& s, int64_t first, int64_t end, const float* m, int64_t rows, int64_t stride, const float* bias,
             void* result) {
    const int64_t channels = s.channels_out, step = rows * stride;
    T* y = static_cast<T*>(result);
    for (int64_t index = first; index < end; ++index) {
        const Tile tile = tile_at(s, index);
        T* image = y + tile.image * s.out_height * s.out_width * channels;
        T* to[16];
        for (int64_t i = 0; i < 4; ++i)
            for (int64_t j = 0; j < 4; ++j) {
                const bool inside = tile.top + i < s.out_height && tile.left + j < s.out_width;
                to[i * 4 + j] = inside ? image + ((tile.top + i) * s.out_width + tile.left + j) * channels : nullptr;
            }
        const float* from = m + (index - first) * stride;
        int64_t c = 0;
        for (; c + lanes <= channels; c += lanes) scatter_channels<lanes>(from, step, bias, to, c);
        for (; c < channels; ++c) scatter_channels<1>(from, step, bias, to, c);
    }
}

// R tiles times V vectors of output channels, held in registers over all input channels.
template <int R, int V>
FD2FAST_INLINE void multiply_block(const float* from, int64_t depth, const float* panel, float* to, int64_t stride) {
    F<lanes> sum[R][V] = {};
    for (int64_t k = 0; k < depth; ++k) {
        F<lanes> w[V];
        for (int j = 0; j < V; ++j) w[j] = load<lanes>(panel + (k * V + j) * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < V; ++j) sum[i][j] += w[j] * from[i * depth + k];
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < V; ++j) store<lanes>(to + i * stride + j * lanes, sum[i][j]);
}

template <int R, int V>
FD2FAST_INLINE void multiply_rest(int64_t rows, const float* from, int64_t depth, const float* panel, float* to, int64_t stride) {
    if constexpr (R > 0) {
        if (rows == R) return multiply_block<R, V>(from, depth, panel, to, stride);
        multiply_rest<R - 1, V>(rows, from, depth, panel, to, stride);
    }
}

template <int V>
void multiply_panel(const Products& p, const float* panel, int64_t column, int64_t first, int64_t end) {
    int64_t row = first;
    for (; row + rows_at_once <= end; row += rows_at_once)
        multiply_block<rows_at_once, V>(p.a + row * p.channels_in, p.channels_in, panel, p.c + row * p.stride + column, p.stride);
    multiply_rest<rows_at_once - 1, V>(end - row, p.a + row * p.channels_in, p.channels_in, panel,
                                       p.c + row * p.stride + column, p.stride);
}

void multiply(const Products& p, int64_t first, int64_t end) {
    constexpr int64_t wide = lanes * vectors;
    int64_t column = 0;
    const float* panel = p.packed;
    for (; column + wide <= p.stride; column += wide, panel += wide * p.channels_in)
        multiply_panel<vectors>(p, panel, column, first, end);
    if (column < p.stride) multiply_panel<1>(p, panel, column, first, end);
}

template <typename T>
constexpr Kernels kernels_for = {lanes, vectors, gather<T>, multiply, scatter<T>};

}  // namespace

namespace FD2FAST_ISA {
const Kernels& kernels(Type type) { return type == Type::float32 ? kernels_for<float> : kernels_for<bfloat16>; }
}  // namespace FD2FAST_ISA

}  // namespace fd2fast::winograd
