// One Adam step and the clamp, in one pass over the images; built without contraction, so that vectors and rests agree.
#include "adam.hpp"

#include <algorithm>
#include <cmath>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FD2FAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FD2FAST_CLONES
#endif

namespace fd2fast::adam {
namespace {

using std::int64_t;

FD2FAST_CLONES void run(int64_t count, const Rates& given, float low, float high, const float* __restrict grad,
                        float* __restrict image, float* __restrict exp_avg, float* __restrict exp_avg_sq) {
    const Rates r = given;
    for (int64_t i = 0; i < count; ++i) {
        const float g = grad[i];
        const float m = exp_avg[i] + r.rest1 * (g - exp_avg[i]);
        const float v = exp_avg_sq[i] * r.beta2 + r.rest2 * (g * g);
        float x = image[i] - r.size * (m / (std::sqrt(v) / r.root + r.eps));
        x = x < low ? low : x;  // a comparison with NaN is false: NaN passes, as in torch
        x = x > high ? high : x;
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        image[i] = x;
    }
}

constexpr int64_t piece = 16384;  // values: enough to pay for a thread's turn

}  // namespace

void step_clamp(int64_t planes, int64_t area, int64_t channels, const Rates& rates, const float* low, const float* high,
                const float* grad, float* image, float* exp_avg, float* exp_avg_sq, int threads) {
    (void)threads;  // unused without OpenMP
    const int64_t per_plane = (area + piece - 1) / piece;
#pragma omp parallel for num_threads(threads) schedule(static) if (planes * area > 2 * piece)
    for (int64_t i = 0; i < planes * per_plane; ++i) {
        const int64_t plane = i / per_plane, first = i % per_plane * piece, at = plane * area + first;
        run(std::min(piece, area - first), rates, low[plane % channels], high[plane % channels], grad + at, image + at,
            exp_avg + at, exp_avg_sq + at);
    }
}

}  // namespace fd2fast::adam
