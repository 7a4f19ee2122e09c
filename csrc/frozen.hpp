// CPU kernels of a frozen network's layers: maps are channels-last, rows of pixels with their channels side by side.
#pragma once

#include <cstdint>
#include <vector>

namespace fd2fast::frozen {

enum class Type { float32 = 0, bfloat16 = 1 };
enum class Activation { identity = 0, relu = 1, relu6 = 2 };

// Rows (images) of a batch belong to segments: row offsets from 0 to N. A map has N x area pixels of `channels` values.
struct Map {
    Type type;
    std::vector<std::int64_t> segments;
    std::int64_t area;
    std::int64_t channels;
    int threads;
};

// Constants of a BN layer in eval mode, [channels] each.
struct BatchNorm {
    const float* scale;
    const float* shift;
    const float* running_mean;
    const float* running_var;
    Activation activation;
};

// y = activation(x scale + shift + residual), mean and biased variance [segments, channels] of x, and
// loss [segments] = |var - running_var| + |mean - running_mean|, in one pass over x.
// residual and bits may be null; bits [pixels, ceil(channels / 8)] tell where the activation is open.
// The sums do not depend on the number of threads.
void bn_act_forward(const Map& map, const BatchNorm& bn, const void* x, const void* residual, void* y,
                    std::uint8_t* bits, float* mean, float* var, float* loss);

// grad_x from grad (of y) and grad_loss [segments]; grad_residual may be null. Without bits the activation's mask follows
// from x.
void bn_act_backward(const Map& map, const BatchNorm& bn, const void* x, const void* grad, const std::uint8_t* bits,
                     const float* mean, const float* var, const float* grad_loss, void* grad_x, void* grad_residual);

// Mean and biased variance [segments, channels] alone, and the gradient of x from those of both.
void statistics(const Map& map, const void* x, float* mean, float* var);
void statistics_backward(const Map& map, const void* x, const float* mean, const float* grad_mean, const float* grad_var,
                         void* grad_x);

// y = activation(cat(maps) scale + shift) over maps of channels[i]; `map` describes the whole. loss [segments] as of bn_act_forward,
// from statistics that are known: of each map mean, then variance [2, segments, channels[i]].
void join_forward(const Map& map, const BatchNorm& bn, const std::vector<const void*>& maps,
                  const std::vector<const float*>& statistics, const std::vector<std::int64_t>& channels, void* y, float* loss);
void join_backward(const Map& map, const BatchNorm& bn, const std::vector<const void*>& maps,
                   const std::vector<const float*>& statistics, const std::vector<std::int64_t>& channels, const void* grad,
                   const float* grad_loss, const std::vector<void*>& grads, const std::vector<float*>& grad_statistics);

struct Window {
    std::int64_t kernel[2], stride[2], padding[2], dilation[2];
    std::int64_t in[2], out[2];  // height, width
};

// Max pooling; places [N, out, channels]: row * kernel width + column of the first maximum within its window.
void max_pool_forward(Type type, std::int64_t images, std::int64_t channels, const Window& window, const void* x, void* y,
                      std::uint8_t* places, int threads);
void max_pool_backward(Type type, std::int64_t images, std::int64_t channels, const Window& window, const void* grad,
                       const std::uint8_t* places, void* grad_x, int threads);

// Input gradient of a convolution with one filter for each channel; weight [kernel pixels, channels] in fp32.
void depthwise_backward(Type type, std::int64_t images, std::int64_t channels, const Window& window, const void* grad,
                        const float* weight, void* grad_x, int threads);

// z = r / |r| for r = sign(x) sqrt(|x| + eps), x [rows, dims]; norms [rows]: |r|, at least 1e-12.
void unit_root_forward(std::int64_t rows, std::int64_t dims, float eps, const float* x, float* z, float* norms, int threads);
// grad_x from grad (of z), where the slope at 0 is 0.
void unit_root_backward(std::int64_t rows, std::int64_t dims, float eps, const float* x, const float* z, const float* norms,
                        const float* grad, float* grad_x, int threads);

// out [rows, classes] = |z - c| for z [rows, dims] and c [classes, dims], in fp32, from differences.
void distances(std::int64_t rows, std::int64_t classes, std::int64_t dims, const float* z, const float* prototypes, float* out,
               int threads);

// out [rows, dims] = sum over classes of weights [rows, classes] times (z - c).
void pull(std::int64_t rows, std::int64_t classes, std::int64_t dims, const float* z, const float* prototypes,
          const float* weights, float* out, int threads);

}  // namespace fd2fast::frozen
