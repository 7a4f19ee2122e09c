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
// half that of the usual 1 and 2, and twice that of the plain sums (measured, see models/winograd.py).
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

template <typename V>
FD2FAST_INLINE void transform_filter(const V (&g)[3], V (&t)[6]) {
    const V even_a = (g[0] + g[2] * 0.5f) * (-2.0f / 3.0f), odd_a = g[1] * (a * (-2.0f / 3.0f));
    const V even_b = (g[0] + g[2] * 2.0f) * (1.0f / 6.0f), odd_b = g[1] * (b * (1.0f / 6.0f));
    t[0] = g[0];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = g[2];
}

void filters(const Filters& f, int64_t k, int64_t column, int64_t channels_out, bool turned, float* to, int64_t step) {
    const int64_t own = turned ? f.strides[1] : f.strides[0], other = turned ? f.strides[0] : f.strides[1];
    const int64_t count = channels_out - column < lanes ? channels_out - column : lanes;
    float taps[9][lanes] = {};
    for (int64_t i = 0; i < 3; ++i)
        for (int64_t j = 0; j < 3; ++j) {
            const float* from = f.from + k * other + column * own + i * f.strides[2] + j * f.strides[3];
            float* at = taps[turned ? 8 - (i * 3 + j) : i * 3 + j];
            for (int64_t lane = 0; lane < count; ++lane) at[lane] = from[lane * own];
        }
    F<lanes> half[6][3];
    for (int j = 0; j < 3; ++j) {
        F<lanes> g[3], t[6];
        for (int i = 0; i < 3; ++i) g[i] = load<lanes>(taps[i * 3 + j]);
        transform_filter(g, t);
        for (int i = 0; i < 6; ++i) half[i][j] = t[i];
    }
    for (int i = 0; i < 6; ++i) {
        F<lanes> t[6];
        transform_filter(half[i], t);
        for (int j = 0; j < 6; ++j) store<lanes>(to + (i * 6 + j) * step, t[j]);
    }
}

template <typename V>
FD2FAST_INLINE void transform_gradient(const V (&y)[4], V (&m)[6]) {
    const V even_a = y[0] + y[2] * 0.5f, odd_a = y[1] * a + y[3] * a_cubed;
    const V even_b = y[0] + y[2] * 2.0f, odd_b = y[1] * b + y[3] * b_cubed;
    m[0] = y[0];
    m[1] = even_a + odd_a;
    m[2] = even_a - odd_a;
    m[3] = even_b + odd_b;
    m[4] = even_b - odd_b;
    m[5] = y[3];
}

template <int W, typename T>
FD2FAST_INLINE void spread_channels(const T* const (&from)[16], int64_t c, float* m, int64_t step) {
    F<W> half[6][4];
    for (int j = 0; j < 4; ++j) {
        F<W> column[4], t[6];
        for (int i = 0; i < 4; ++i) column[i] = load<W>(from[i * 4 + j] + c);
        transform_gradient(column, t);
        for (int i = 0; i < 6; ++i) half[i][j] = t[i];
    }
    for (int i = 0; i < 6; ++i) {
        F<W> t[6];
        transform_gradient(half[i], t);
        for (int j = 0; j < 6; ++j) store<W>(m + (i * 6 + j) * step + c, t[j]);
    }
}

template <typename T>
void spread(const Shape& s, int64_t first, int64_t end, const void* gradient, const float* zeros, float* m, int64_t rows,
            int64_t stride) {
    const int64_t channels = s.channels_out, step = rows * stride;
    const T *grad = static_cast<const T*>(gradient), *none = reinterpret_cast<const T*>(zeros);
    for (int64_t index = first; index < end; ++index) {
        const Tile tile = tile_at(s, index);
        const T* image = grad + tile.image * s.out_height * s.out_width * channels;
        const T* from[16];
        for (int64_t i = 0; i < 4; ++i)
            for (int64_t j = 0; j < 4; ++j) {
                const bool inside = tile.top + i < s.out_height && tile.left + j < s.out_width;
                from[i * 4 + j] = inside ? image + ((tile.top + i) * s.out_width + tile.left + j) * channels : none;
            }
        float* to = m + (index - first) * stride;
        int64_t c = 0;
        for (; c + lanes <= channels; c += lanes) spread_channels<lanes>(from, c, to, step);
        for (; c < channels; ++c) spread_channels<1>(from, c, to, step);
        // the lanes behind the last channel are multiplied, too
        for (; c < stride; ++c)
            for (int64_t p = 0; p < positions; ++p) to[p * step + c] = 0.0f;
    }
}

// Input channels [k, k + R) times V vectors of output channels.
template <int R, int V>
FD2FAST_INLINE void accumulate_block(const float* v, const float* m, int64_t rows, int64_t channels_in, int64_t stride, float* to) {
    F<lanes> sum[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < V; ++j) sum[i][j] = load<lanes>(to + i * stride + j * lanes);
    for (int64_t t = 0; t < rows; ++t) {
        F<lanes> w[V];
        for (int j = 0; j < V; ++j) w[j] = load<lanes>(m + t * stride + j * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < V; ++j) sum[i][j] += w[j] * v[t * channels_in + i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < V; ++j) store<lanes>(to + i * stride + j * lanes, sum[i][j]);
}

template <int R, int V>
FD2FAST_INLINE void accumulate_rest(int64_t left, const float* v, const float* m, int64_t rows, int64_t channels_in,
                                    int64_t stride, float* to) {
    if constexpr (R > 0) {
        if (left == R) return accumulate_block<R, V>(v, m, rows, channels_in, stride, to);
        accumulate_rest<R - 1, V>(left, v, m, rows, channels_in, stride, to);
    }
}

template <int V>
void accumulate_panel(const float* v, const float* m, int64_t rows, int64_t channels_in, int64_t stride, float* sums) {
    int64_t k = 0;
    for (; k + rows_at_once <= channels_in; k += rows_at_once)
        accumulate_block<rows_at_once, V>(v + k, m, rows, channels_in, stride, sums + k * stride);
    accumulate_rest<rows_at_once - 1, V>(channels_in - k, v + k, m, rows, channels_in, stride, sums + k * stride);
}

void accumulate(const float* v, const float* m, int64_t rows, int64_t channels_in, int64_t stride, float* sums) {
    constexpr int64_t wide = lanes * vectors;
    int64_t column = 0;
    for (; column + wide <= stride; column += wide)
        accumulate_panel<vectors>(v, m + column, rows, channels_in, stride, sums + column);
    if (column < stride) accumulate_panel<1>(v, m + column, rows, channels_in, stride, sums + column);
}

template <typename V>
FD2FAST_INLINE void collect_filter(const V (&u)[6], V (&g)[3]) {
    const V even_a = (u[1] + u[2]) * (-2.0f / 3.0f), odd_a = (u[1] - u[2]) * (a * (-2.0f / 3.0f));
    const V even_b = (u[3] + u[4]) * (1.0f / 6.0f), odd_b = (u[3] - u[4]) * (b * (1.0f / 6.0f));
    g[0] = u[0] + (even_a + even_b);
    g[1] = odd_a + odd_b;
    g[2] = (even_a * 0.5f + even_b * 2.0f) + u[5];
}

void collect(const Filters& f, const float* sums, int64_t k, int64_t channels_in, int64_t channels_out, int64_t stride) {
    const int64_t step = channels_in * stride;
    for (int64_t column = 0; column < channels_out; column += lanes) {
        const float* from = sums + k * stride + column;
        F<lanes> half[3][6];
        for (int j = 0; j < 6; ++j) {
            F<lanes> u[6], g[3];
            for (int i = 0; i < 6; ++i) u[i] = load<lanes>(from + (i * 6 + j) * step);
            collect_filter(u, g);
            for (int i = 0; i < 3; ++i) half[i][j] = g[i];
        }
        const int64_t count = channels_out - column < lanes ? channels_out - column : lanes;
        for (int i = 0; i < 3; ++i) {
            F<lanes> g[3];
            collect_filter(half[i], g);
            for (int j = 0; j < 3; ++j) {
                float taps[lanes];
                store<lanes>(taps, g[j]);
                float* to = f.to + k * f.strides[1] + column * f.strides[0] + i * f.strides[2] + j * f.strides[3];
                for (int64_t lane = 0; lane < count; ++lane) to[lane * f.strides[0]] = taps[lane];
            }
        }
    }
}

template <typename T>
constexpr Kernels kernels_for = {lanes,   vectors,   gather<T>,  multiply, scatter<T>,
                                 filters, spread<T>, accumulate, collect};

}  // namespace

namespace FD2FAST_ISA {
const Kernels& kernels(Type type) { return type == Type::float32 ? kernels_for<float> : kernels_for<bfloat16>; }
}  // namespace FD2FAST_ISA

}  // namespace fd2fast::winograd
