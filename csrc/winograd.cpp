// Winograd convolutions: shares the tiles out over blocks that stay in the cache, and blocks over threads.
#include "winograd.hpp"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "level.hpp"
#include "winograd_kernels.hpp"

namespace fd2fast::winograd {

using std::int64_t;

namespace {

const Kernels& kernels(Type type) { return FD2FAST_FOR_LEVEL(kernels)(type); }

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Output channels as they are held in transformed form: whole vectors.
int64_t stride_of(const Kernels& loops, int64_t channels_out) { return round_up(channels_out, loops.lanes); }

int64_t tiles_of(const Shape& shape) {
    const int64_t down = (shape.out_height + tile_outputs - 1) / tile_outputs;
    return shape.images * down * ((shape.out_width + tile_outputs - 1) / tile_outputs);
}

// Scratch of a block: transformed inputs and products.
constexpr int64_t block_floats = 1 << 18, least_tiles = 24;

}  // namespace

int64_t packed_floats(int64_t channels_in, int64_t channels_out) {
    return positions * channels_in * stride_of(kernels(Type::float32), channels_out);
}

void convolve(Type type, const Shape& shape, const void* x, const float* packed, const float* bias, void* y, int threads) {
    const Kernels& loops = kernels(type);
    const int64_t stride = stride_of(loops, shape.channels_out), depth = shape.channels_in;
    const int64_t tiles = tiles_of(shape);
    const int64_t fitting = std::max(least_tiles, block_floats / (positions * (depth + stride)) / 12 * 12);
    const int64_t blocks = (tiles + fitting - 1) / fitting;
    const std::vector<float> zeros(depth, 0.0f);
    const bool together = threads > 1 && blocks < 2 * threads;  // too few blocks for the threads: they share each stage
    const int64_t rows = together ? tiles : std::min(tiles, (tiles + blocks - 1) / blocks);
    const int64_t floats = positions * rows * (depth + stride);
    const int64_t workers = together ? 1 : std::min<int64_t>(threads, blocks);
    const std::unique_ptr<float[]> scratch(new float[floats * workers]);
    const auto products = [&](float* v, float* m, int64_t position) {
        return Products{depth,       shape.channels_out, v + position * rows * depth, packed + position * depth * stride,
                        m + position * rows * stride, stride};
    };
    if (together) {
        float *v = scratch.get(), *m = v + positions * rows * depth;
        constexpr int64_t few = 4;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < (tiles + few - 1) / few; ++t)
                loops.gather(shape, t * few, std::min(tiles, (t + 1) * few), x, zeros.data(), v + t * few * depth, rows);
#pragma omp for schedule(static)
            for (int64_t position = 0; position < positions; ++position)
                loops.multiply(products(v, m, position), 0, tiles);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < (tiles + few - 1) / few; ++t)
                loops.scatter(shape, t * few, std::min(tiles, (t + 1) * few), m + t * few * stride, rows, stride, bias, y);
        }
        return;
    }
#pragma omp parallel num_threads(static_cast<int>(workers))
    {
        int worker = 0;
#ifdef _OPENMP
        worker = omp_get_thread_num();
#endif
        float *v = scratch.get() + worker * floats, *m = v + positions * rows * depth;
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < (tiles + rows - 1) / rows; ++block) {
            const int64_t first = block * rows, end = std::min(tiles, first + rows);
            loops.gather(shape, first, end, x, zeros.data(), v, rows);
            for (int64_t position = 0; position < positions; ++position)
                loops.multiply(products(v, m, position), 0, end - first);
            loops.scatter(shape, first, end, m, rows, stride, bias, y);
        }
    }
}

void transform_and_pack(const float* weight, const int64_t (&strides)[4], int64_t channels_in, int64_t channels_out, bool turned,
                        float* packed, int threads) {
    const Kernels& loops = kernels(Type::float32);
    const int64_t stride = stride_of(loops, channels_out), wide = loops.lanes * loops.vectors;
    const Filters filters{weight, nullptr, {strides[0], strides[1], strides[2], strides[3]}};
    (void)threads;  // unused without OpenMP
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < channels_in; ++k)
        for (int64_t column = 0; column < stride; column += loops.lanes) {
            // full panels hold `vectors` vectors side by side, a last single one its own
            const int64_t first = column / wide * wide, width = first + wide <= stride ? wide : loops.lanes;
            float* to = packed + first * channels_in + k * width + (column - first);
            loops.filters(filters, k, column, channels_out, turned, to, channels_in * stride);
        }
}

void weight_gradient(Type type, const Shape& shape, const void* x, const void* grad, float* grad_weight,
                     const int64_t (&strides)[4], int threads) {
    const Kernels& loops = kernels(type);
    const int64_t stride = stride_of(loops, shape.channels_out), depth = shape.channels_in;
    const int64_t tiles = tiles_of(shape);
    const int64_t rows = std::min(tiles, std::max(least_tiles, block_floats / (positions * (depth + stride))));
    const std::vector<float> zeros(std::max(depth, shape.channels_out), 0.0f);
    std::vector<float> sums(positions * depth * stride, 0.0f);
    const std::unique_ptr<float[]> scratch(new float[positions * rows * (depth + stride)]);
    float *v = scratch.get(), *m = v + positions * rows * depth;
    constexpr int64_t few = 4;
    (void)threads;
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < tiles; first += rows) {
        const int64_t count = std::min(tiles - first, rows);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < count; t += few) {
            const int64_t begin = first + t, end = first + std::min(count, t + few);
            loops.gather(shape, begin, end, x, zeros.data(), v + t * depth, rows);
            loops.spread(shape, begin, end, grad, zeros.data(), m + t * stride, rows, stride);
        }
#pragma omp for schedule(static)
        for (int64_t position = 0; position < positions; ++position)
            loops.accumulate(v + position * rows * depth, m + position * rows * stride, count, depth, stride,
                             sums.data() + position * depth * stride);
    }
    const Filters filters{nullptr, grad_weight, {strides[0], strides[1], strides[2], strides[3]}};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < depth; ++k)
        loops.collect(filters, sums.data(), k, depth, shape.channels_out, stride);
}

}  // namespace fd2fast::winograd
