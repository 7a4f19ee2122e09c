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

const Kernels& kernels(Type type) {
#ifdef FD2FAST_X86_LEVELS
    if (level() == 5) return v4_bf16::kernels(type);
    if (level() == 4) return v4::kernels(type);
    if (level() == 3) return v3::kernels(type);
#endif
    return base::kernels(type);
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Output channels as they are held in transformed form: whole vectors.
int64_t stride_of(const Kernels& loops, int64_t channels_out) { return round_up(channels_out, loops.lanes); }

// Scratch of a block: transformed inputs and products.
constexpr int64_t block_floats = 1 << 18, least_tiles = 24;

}  // namespace

int64_t packed_floats(int64_t channels_in, int64_t channels_out) {
    return positions * channels_in * stride_of(kernels(Type::float32), channels_out);
}

void pack(const float* transformed, int64_t channels_in, int64_t channels_out, float* packed) {
    const Kernels& loops = kernels(Type::float32);
    const int64_t stride = stride_of(loops, channels_out), wide = loops.lanes * loops.vectors;
    for (int64_t position = 0; position < positions; ++position) {
        const float* from = transformed + position * channels_in * channels_out;
        for (int64_t column = 0; column < stride;) {
            const int64_t width = column + wide <= stride ? wide : loops.lanes;
            for (int64_t k = 0; k < channels_in; ++k)
                for (int64_t j = column; j < column + width; ++j)
                    *packed++ = j < channels_out ? from[k * channels_out + j] : 0.0f;
            column += width;
        }
    }
}

void convolve(Type type, const Shape& shape, const void* x, const float* packed, const float* bias, void* y, int threads) {
    const Kernels& loops = kernels(type);
    const int64_t stride = stride_of(loops, shape.channels_out), depth = shape.channels_in;
    const int64_t down = (shape.out_height + tile_outputs - 1) / tile_outputs;
    const int64_t across = (shape.out_width + tile_outputs - 1) / tile_outputs;
    const int64_t tiles = shape.images * down * across;
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

}  // namespace fd2fast::winograd
