// CPU kernel of adam_clamp_ (fd2fast/reference/adam_clamp.py is its specification): no Python, no torch.
#pragma once

#include <cstdint>

namespace fd2fast::adam {

// What an iteration multiplies with: b of the moments, b' = 1 - b, and of the step x -= size m / (sqrt(v) / root + eps).
struct Rates {
    float rest1, beta2, rest2, size, root, eps;
};

// Image and moments are `planes` contiguous runs of `area` values; plane p is clamped to [low[p % channels], high[p % channels]].
// The result of an element depends on that element alone, to the last bit.
void step_clamp(std::int64_t planes, std::int64_t area, std::int64_t channels, const Rates& rates, const float* low,
                const float* high, const float* grad, float* image, float* exp_avg, float* exp_avg_sq, int threads);

}  // namespace fd2fast::adam
