// CPU kernels of a frozen network's layers: shares the work out over chunks and threads, and sums up.
#include "frozen.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "frozen_kernels.hpp"
#include "level.hpp"

namespace fd2fast::frozen {

using std::int64_t;
using std::uint32_t;
using std::uint8_t;

namespace {

const Kernels& kernels(Type type) { return FD2FAST_FOR_LEVEL(kernels)(type); }

const VectorKernels& vector_kernels() { return FD2FAST_FOR_LEVEL(vector_kernels)(); }

std::vector<Chunk> chunks_of(const Map& map) {
    // by shape only, so that sums do not depend on threads; about 32 Ki values, at most 1024 pixels in one fp32 sum
    const int64_t c = map.channels, length = std::clamp<int64_t>(32768 / std::max<int64_t>(c, 1), 16, 1024);
    std::vector<Chunk> chunks;
    for (std::size_t s = 0; s + 1 < map.segments.size(); ++s) {
        const int64_t end = map.segments[s + 1] * map.area;
        for (int64_t p = map.segments[s] * map.area; p < end; p += length)
            chunks.push_back({static_cast<int64_t>(s), p, std::min(end, p + length), c});
    }
    return chunks;
}

template <typename Work>
void parallel(int64_t count, int threads, const Work& work) {
    (void)threads;  // unused without OpenMP
    // exceptions cannot leave a parallel region: the work allocates nothing
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) work(i);
}

template <typename Work>
void over_chunks(const Map& map, const std::vector<Chunk>& chunks, const Work& work) {
    const Kernels& loops = kernels(map.type);
    parallel(static_cast<int64_t>(chunks.size()), map.threads, [&](int64_t i) { work(loops, chunks[i], i); });
}

// Sums over chunks [chunks, 2, channels] about an origin -> mean and biased variance, in double, in the chunks' order.
void finish(const Map& map, const std::vector<Chunk>& chunks, const std::vector<float>& sums, const float* origin,
            bool origin_per_segment, float* mean, float* var) {
    const int64_t c = map.channels, segments = static_cast<int64_t>(map.segments.size()) - 1;
    std::vector<double> total(2 * c);
    std::size_t i = 0;
    for (int64_t s = 0; s < segments; ++s) {
        std::fill(total.begin(), total.end(), 0.0);
        for (; i < chunks.size() && chunks[i].segment == s; ++i)
            for (int64_t k = 0; k < 2 * c; ++k) total[k] += sums[i * 2 * c + k];
        const double count = static_cast<double>((map.segments[s + 1] - map.segments[s]) * map.area);
        for (int64_t k = 0; k < c; ++k) {
            const double o = origin[origin_per_segment ? s * c + k : k];
            const double m = count > 0 ? total[k] / count : 0.0;
            mean[s * c + k] = count > 0 ? static_cast<float>(o + m) : 0.0f;
            // the larger of the two and 0: rounding may leave a constant channel just below; NaN stays NaN
            const double v = count > 0 ? total[c + k] / count - m * m : 0.0;
            var[s * c + k] = static_cast<float>(v < 0.0 ? 0.0 : v);
        }
    }
}

double squared_distance(const float* a, const float* b, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        const double d = static_cast<double>(a[i]) - b[i];
        sum += d * d;
    }
    return sum;
}

double distance(const float* a, const float* b, int64_t n) { return std::sqrt(squared_distance(a, b, n)); }

}  // namespace

void bn_act_forward(const Map& map, const BatchNorm& bn, const void* x, const void* residual, void* y, uint8_t* bits,
                    float* mean, float* var, float* loss) {
    const auto chunks = chunks_of(map);
    const int64_t c = map.channels;
    std::vector<float> sums(chunks.size() * 2 * c);
    over_chunks(map, chunks, [&](const Kernels& loops, const Chunk& chunk, int64_t i) {
        loops.forward(chunk, bn, x, residual, y, bits, sums.data() + i * 2 * c);
    });
    finish(map, chunks, sums, bn.running_mean, false, mean, var);
    for (std::size_t s = 0; s + 1 < map.segments.size(); ++s) {
        const bool empty = map.segments[s + 1] == map.segments[s];
        loss[s] = empty ? 0.0f
                        : static_cast<float>(distance(var + s * c, bn.running_var, c) +
                                             distance(mean + s * c, bn.running_mean, c));
    }
}

void bn_act_backward(const Map& map, const BatchNorm& bn, const void* x, const void* grad, const uint8_t* bits,
                     const float* mean, const float* var, const float* grad_loss, void* grad_x, void* grad_residual) {
    const auto chunks = chunks_of(map);
    const int64_t c = map.channels, segments = static_cast<int64_t>(map.segments.size()) - 1;
    // dL/dx of the loss is slope x + offset
    std::vector<float> slope(segments * c), offset(segments * c);
    for (int64_t s = 0; s < segments; ++s) {
        const double count = static_cast<double>((map.segments[s + 1] - map.segments[s]) * map.area);
        if (count == 0) continue;
        const double to_mean = distance(mean + s * c, bn.running_mean, c), to_var = distance(var + s * c, bn.running_var, c);
        const double by_mean = to_mean == 0 ? 0.0 : grad_loss[s] / (to_mean * count);
        const double by_var = to_var == 0 ? 0.0 : 2.0 * grad_loss[s] / (to_var * count);
        for (int64_t k = 0; k < c; ++k) {
            const int64_t at = s * c + k;
            const double m = by_var * (static_cast<double>(var[at]) - bn.running_var[k]);
            slope[at] = static_cast<float>(m);
            offset[at] =
                static_cast<float>(by_mean * (static_cast<double>(mean[at]) - bn.running_mean[k]) - m * mean[at]);
        }
    }
    over_chunks(map, chunks, [&](const Kernels& loops, const Chunk& chunk, int64_t) {
        const int64_t at = chunk.segment * c;
        loops.backward(chunk, bn, x, grad, bits, slope.data() + at, offset.data() + at, grad_x, grad_residual);
    });
}

void statistics(const Map& map, const void* x, float* mean, float* var) {
    const auto chunks = chunks_of(map);
    const int64_t c = map.channels, segments = static_cast<int64_t>(map.segments.size()) - 1;
    // about the first pixel of each segment: sums of squares about 0 lose digits for large means
    std::vector<float> origin(segments * c), sums(chunks.size() * 2 * c);
    for (int64_t s = 0; s < segments; ++s) {
        if (map.segments[s + 1] == map.segments[s]) continue;
        for (int64_t k = 0; k < c; ++k) {
            const int64_t at = map.segments[s] * map.area * c + k;
            float v;
            if (map.type == Type::float32) {
                v = static_cast<const float*>(x)[at];
            } else {
                const uint32_t wide = static_cast<uint32_t>(static_cast<const std::uint16_t*>(x)[at]) << 16;
                std::memcpy(&v, &wide, sizeof v);
            }
            origin[s * c + k] = v;
        }
    }
    over_chunks(map, chunks, [&](const Kernels& loops, const Chunk& chunk, int64_t i) {
        loops.sums(chunk, x, origin.data() + chunk.segment * c, sums.data() + i * 2 * c);
    });
    finish(map, chunks, sums, origin.data(), true, mean, var);
}

void statistics_backward(const Map& map, const void* x, const float* mean, const float* grad_mean, const float* grad_var,
                         void* grad_x) {
    const int64_t c = map.channels, segments = static_cast<int64_t>(map.segments.size()) - 1;
    // dL/dx is slope x + offset
    std::vector<float> slope(segments * c), offset(segments * c);
    for (int64_t s = 0; s < segments; ++s) {
        const auto count = static_cast<float>((map.segments[s + 1] - map.segments[s]) * map.area);
        for (int64_t at = s * c; count > 0 && at < (s + 1) * c; ++at) {
            slope[at] = 2 * grad_var[at] / count;
            offset[at] = grad_mean[at] / count - slope[at] * mean[at];
        }
    }
    over_chunks(map, chunks_of(map), [&](const Kernels& loops, const Chunk& chunk, int64_t) {
        const int64_t at = chunk.segment * c;
        loops.affine(chunk, x, slope.data() + at, offset.data() + at, grad_x);
    });
}

namespace {

// Of statistics [2, segments, channels[i]] of each map, one segment's: |var - running_var| and |mean - running_mean|.
struct Apart {
    double mean = 0.0, var = 0.0;

    Apart(const Map& map, const BatchNorm& bn, const std::vector<const float*>& statistics,
          const std::vector<int64_t>& channels, int64_t segment) {
        const int64_t segments = static_cast<int64_t>(map.segments.size()) - 1;
        int64_t first = 0;
        for (std::size_t i = 0; i < statistics.size(); first += channels[i++]) {
            const int64_t c = channels[i];
            mean += squared_distance(statistics[i] + segment * c, bn.running_mean + first, c);
            var += squared_distance(statistics[i] + (segments + segment) * c, bn.running_var + first, c);
        }
        mean = std::sqrt(mean);
        var = std::sqrt(var);
    }
};

}  // namespace

void join_forward(const Map& map, const BatchNorm& bn, const std::vector<const void*>& maps,
                  const std::vector<const float*>& statistics, const std::vector<int64_t>& channels, void* y, float* loss) {
    for (std::size_t s = 0; s + 1 < map.segments.size(); ++s) {
        const Apart apart(map, bn, statistics, channels, static_cast<int64_t>(s));
        loss[s] = map.segments[s + 1] == map.segments[s] ? 0.0f : static_cast<float>(apart.var + apart.mean);
    }
    over_chunks(map, chunks_of(map), [&](const Kernels& loops, const Chunk& chunk, int64_t) {
        int64_t first = 0;
        for (std::size_t i = 0; i < maps.size(); first += channels[i++])
            loops.join(chunk, bn, {maps[i], first, channels[i]}, y);
    });
}

void join_backward(const Map& map, const BatchNorm& bn, const std::vector<const void*>& maps,
                   const std::vector<const float*>& statistics, const std::vector<int64_t>& channels, const void* grad,
                   const float* grad_loss, const std::vector<void*>& grads, const std::vector<float*>& grad_statistics) {
    const int64_t segments = static_cast<int64_t>(map.segments.size()) - 1;
    for (int64_t s = 0; s < segments; ++s) {
        const Apart apart(map, bn, statistics, channels, s);
        const bool empty = map.segments[s + 1] == map.segments[s];
        const float to_mean = empty || apart.mean == 0.0 ? 0.0f : static_cast<float>(grad_loss[s] / apart.mean);
        const float to_var = empty || apart.var == 0.0 ? 0.0f : static_cast<float>(grad_loss[s] / apart.var);
        int64_t first = 0;
        for (std::size_t i = 0; i < statistics.size(); first += channels[i++]) {
            const int64_t c = channels[i], mean = s * c, var = (segments + s) * c;
            for (int64_t k = 0; k < c; ++k) {
                grad_statistics[i][mean + k] = to_mean * (statistics[i][mean + k] - bn.running_mean[first + k]);
                grad_statistics[i][var + k] = to_var * (statistics[i][var + k] - bn.running_var[first + k]);
            }
        }
    }
    over_chunks(map, chunks_of(map), [&](const Kernels& loops, const Chunk& chunk, int64_t) {
        int64_t first = 0;
        for (std::size_t i = 0; i < maps.size(); first += channels[i++])
            loops.split(chunk, bn, {maps[i], first, channels[i]}, grad, grads[i]);
    });
}

void max_pool_forward(Type type, int64_t images, int64_t channels, const Window& window, const void* x, void* y,
                      uint8_t* places, int threads) {
    const Kernels& loops = kernels(type);
    parallel(images * window.out[0], threads,
             [&](int64_t row) { loops.pool_row(window, channels, row, x, y, places); });
}

void max_pool_backward(Type type, int64_t images, int64_t channels, const Window& window, const void* grad,
                       const uint8_t* places, void* grad_x, int threads) {
    const Kernels& loops = kernels(type);
    parallel(images * window.in[0], threads,
             [&](int64_t row) { loops.unpool_row(window, channels, row, grad, places, grad_x); });
}

void depthwise_backward(Type type, int64_t images, int64_t channels, const Window& window, const void* grad,
                        const float* weight, void* grad_x, int threads) {
    const Kernels& loops = kernels(type);
    parallel(images * window.in[0], threads,
             [&](int64_t row) { loops.depthwise_row(window, channels, row, grad, weight, grad_x); });
}

void unit_root_forward(int64_t rows, int64_t dims, float eps, const float* x, float* z, float* norms, int threads) {
    const VectorKernels& loops = vector_kernels();
    parallel(rows, threads, [&](int64_t n) { norms[n] = loops.unit_root(dims, eps, x + n * dims, z + n * dims); });
}

void unit_root_backward(int64_t rows, int64_t dims, float eps, const float* x, const float* z, const float* norms,
                        const float* grad, float* grad_x, int threads) {
    const VectorKernels& loops = vector_kernels();
    parallel(rows, threads, [&](int64_t n) {
        const int64_t at = n * dims;
        loops.unit_root_grad(dims, eps, norms[n], x + at, z + at, grad + at, grad_x + at);
    });
}

void distances(int64_t rows, int64_t classes, int64_t dims, const float* z, const float* prototypes, float* out, int threads) {
    const VectorKernels& loops = vector_kernels();
    parallel(classes, threads, [&](int64_t k) { loops.distances(rows, dims, z, prototypes + k * dims, out + k, classes); });
}

void pull(int64_t rows, int64_t classes, int64_t dims, const float* z, const float* prototypes, const float* weights,
          float* out, int threads) {
    const VectorKernels& loops = vector_kernels();
    constexpr int64_t length = 64;  // a piece of every prototype stays near while all rows see it
    parallel((dims + length - 1) / length, threads, [&](int64_t i) {
        loops.pull(rows, classes, dims, i * length, std::min(dims, (i + 1) * length), z, prototypes, weights, out);
    });
}

}  // namespace fd2fast::frozen
