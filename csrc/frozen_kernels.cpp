// The inner loops of frozen.cpp, in vectors of 16 or 8 channels and single ones; compiled once for each instruction set.
#include "frozen_kernels.hpp"

#include "lanes.hpp"

namespace fd2fast::frozen {
namespace {

// Bytes to and from 32 bits, by way of 16: in one step GCC 12 takes the lanes apart.
template <int W>
FD2FAST_INLINE I<W> widen(typename Lanes<W>::B bytes) {
    return __builtin_convertvector(__builtin_convertvector(bytes, typename Lanes<W>::H), I<W>);
}

template <int W>
FD2FAST_INLINE typename Lanes<W>::B narrow(I<W> v) {
    return __builtin_convertvector(__builtin_convertvector(v, typename Lanes<W>::H), typename Lanes<W>::B);
}

template <Activation A, int W>
FD2FAST_INLINE F<W> activate(F<W> v) {
    const F<W> zero = {};
    // a comparison with NaN is false: NaN passes, as in torch
    if constexpr (A != Activation::identity) v = (v < zero) ? zero : v;
    if constexpr (A == Activation::relu6) v = (v > zero + 6.0f) ? zero + 6.0f : v;
    return v;
}

// All ones where the slope is 1.
template <Activation A, int W>
FD2FAST_INLINE I<W> is_open(F<W> v) {
    const F<W> zero = {};
    if constexpr (A == Activation::identity) return (I<W>)(zero == zero);
    if constexpr (A == Activation::relu) return (I<W>)(v > zero);
    return (I<W>)(v > zero) & (I<W>)(v < zero + 6.0f);
}

template <int W>
FD2FAST_INLINE F<W> masked(F<W> v, I<W> mask) {
    return (F<W>)((I<W>)v & mask);
}

constexpr uint64_t gather = 0x0102040810204080u;  // bit 0 of eight bytes into one byte

// Lane k holds 1 << k.
template <int W>
FD2FAST_INLINE I<W> lane_bits() {
    if constexpr (W == 16)
        return I<16>{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    else
        return I<8>{1, 2, 4, 8, 16, 32, 64, 128};
}

// W <= 16 lanes' masks as bits; W is 1 for the channels behind the last eight: `bit` is the place in the byte.
template <int W>
FD2FAST_INLINE void put_bits(uint8_t* bytes, int bit, I<W> mask) {
    if constexpr (W == 1) {
        if (bit == 0) *bytes = 0;
        *bytes |= static_cast<uint8_t>((mask[0] & 1) << bit);
    } else {
#ifdef FD2FAST_MASKS
        if constexpr (W == 16) {
            const uint16_t all = _mm512_movepi32_mask((__m512i)mask);
            std::memcpy(bytes, &all, 2);
        } else {
            *bytes = _mm256_movepi32_mask((__m256i)mask);
        }
        return;
#endif
        const auto ones = narrow<W>(mask & 1);
        uint64_t words[W / 8];
        std::memcpy(words, &ones, W);
        for (int i = 0; i < W / 8; ++i) bytes[i] = static_cast<uint8_t>((words[i] * gather) >> 56);
    }
}

template <int W>
FD2FAST_INLINE I<W> get_bits(const uint8_t* bytes, int bit) {
    if constexpr (W == 1) {
        I<1> mask;
        mask[0] = -((*bytes >> bit) & 1);
        return mask;
    } else {
#ifdef FD2FAST_MASKS
        if constexpr (W == 16) {
            uint16_t all;
            std::memcpy(&all, bytes, 2);
            return (I<16>)_mm512_movm_epi32(all);
        } else {
            return (I<8>)_mm256_movm_epi32(*bytes);
        }
#endif
        int32_t all = bytes[0];
        if constexpr (W == 16) all |= bytes[1] << 8;
        return (I<W>)(((I<W>{} + all) & lane_bits<W>()) != 0);
    }
}

// Calls body.run<W>(c) for all channels, as many at a time as fill a register, then 8, then 1.
template <typename Body>
FD2FAST_INLINE void for_channels(int64_t channels, const Body& body) {
    int64_t c = 0;
    for (; c + widest <= channels; c += widest) body.template run<widest>(c);
    if (widest > 8 && c + 8 <= channels) {
        body.template run<8>(c);
        c += 8;
    }
    for (; c < channels; ++c) body.template run<1>(c);
}

// A vector of channels is taken through several pixels before the next, with its constants and sums in registers, where they lie
// within block_bytes; else pixel by pixel, for maps that come from memory are fast only when read in their order. Measured on an EPYC
// (Zen 4, one thread, fp32, backward): 20 maps of 96 channels, 32 x 32, 8 pixels 1.2 ms, pixel by pixel 0.6 ms; within the step
// MobileNetV2 spends a third less on it. Asking for the lines ahead by software makes it slower in either order.
constexpr int64_t block_bytes = 1024, most_pixels = 8;

template <typename T>
FD2FAST_INLINE int64_t pixels_at_once(int64_t channels) {
    const int64_t fit = block_bytes / (channels * static_cast<int64_t>(sizeof(T)));
    return fit < 1 ? 1 : fit < most_pixels ? fit : most_pixels;
}

template <typename T, Activation A, bool Residual>
struct Forward {
    const T *x, *residual;
    T* y;
    uint8_t* bits;
    const float *scale, *shift, *origin;
    float *sum, *squares;
    int64_t channels, bytes;
    int pixels;

    template <int W>
    FD2FAST_INLINE void run(int64_t c) const {
        const F<W> k = load<W>(scale + c), b = load<W>(shift + c), o = load<W>(origin + c);
        F<W> s = load<W>(sum + c), q = load<W>(squares + c);
        for (int p = 0; p < pixels; ++p) {
            const int64_t at = p * channels + c;
            const F<W> v = load<W>(x + at);
            const F<W> d = v - o;
            s += d;
            q += d * d;
            F<W> z = v * k + b;
            if constexpr (Residual) {
                z += load<W>(residual + at);
                if constexpr (A != Activation::identity)
                    put_bits<W>(bits + p * bytes + c / 8, static_cast<int>(c % 8), is_open<A, W>(z));
            }
            store<W>(y + at, activate<A, W>(z));
        }
        store<W>(sum + c, s);
        store<W>(squares + c, q);
    }
};

template <typename T, Activation A, bool Residual>
struct Backward {
    const T *x, *grad;
    const uint8_t* bits;
    const float *scale, *shift, *slope, *offset;
    T *grad_x, *grad_residual;
    int64_t channels, bytes;
    int pixels;

    template <int W>
    FD2FAST_INLINE void run(int64_t c) const {
        const F<W> k = load<W>(scale + c), b = load<W>(shift + c);
        const F<W> m = load<W>(slope + c), t = load<W>(offset + c);
        for (int p = 0; p < pixels; ++p) {
            const int64_t at = p * channels + c;
            const F<W> v = load<W>(x + at);
            F<W> g = load<W>(grad + at);
            if constexpr (A != Activation::identity) {
                if constexpr (Residual)
                    g = masked<W>(g, get_bits<W>(bits + p * bytes + c / 8, static_cast<int>(c % 8)));
                else
                    g = masked<W>(g, is_open<A, W>(v * k + b));
            }
            store<W>(grad_x + at, g * k + (v * m + t));
            if constexpr (Residual) store<W>(grad_residual + at, g);
        }
    }
};

template <typename T>
struct Sums {
    const T* x;
    const float* origin;
    float *sum, *squares;
    int64_t channels;
    int pixels;

    template <int W>
    FD2FAST_INLINE void run(int64_t c) const {
        const F<W> o = load<W>(origin + c);
        F<W> s = load<W>(sum + c), q = load<W>(squares + c);
        for (int p = 0; p < pixels; ++p) {
            const F<W> d = load<W>(x + p * channels + c) - o;
            s += d;
            q += d * d;
        }
        store<W>(sum + c, s);
        store<W>(squares + c, q);
    }
};

template <typename T>
struct Affine {
    const T* x;
    const float *slope, *offset;
    T* out;

    template <int W>
    FD2FAST_INLINE void run(int64_t c) const {
        store<W>(out + c, load<W>(x + c) * load<W>(slope + c) + load<W>(offset + c));
    }
};

template <typename T, Activation A>
struct ScaleShift {
    const T* x;
    T* y;
    const float *scale, *shift;

    template <int W>
    FD2FAST_INLINE void run(int64_t c) const {
        store<W>(y + c, activate<A, W>(load<W>(x + c) * load<W>(scale + c) + load<W>(shift + c)));
    }
};

template <typename T, Activation A>
struct ScaleShiftGrad {
    const T *x, *grad;
    T* out;
    const float *scale, *shift;

    template <int W>
    FD2FAST_INLINE void run(int64_t c) const {
        const F<W> k = load<W>(scale + c);
        F<W> g = load<W>(grad + c);
        if constexpr (A != Activation::identity)
            g = masked<W>(g, is_open<A, W>(load<W>(x + c) * k + load<W>(shift + c)));
        store<W>(out + c, g * k);
    }
};

FD2FAST_INLINE int at_most(int64_t most, int64_t n) { return static_cast<int>(n < most ? n : most); }

FD2FAST_INLINE void clear(float* sums, int64_t n) {
    for (int64_t i = 0; i < n; ++i) sums[i] = 0.0f;
}

template <typename T, Activation A, bool R>
FD2FAST_INLINE void forward_chunk(const Chunk& k, const BatchNorm& bn, const T* x, const T* residual, T* y, uint8_t* bits,
                                  float* sums) {
    const int64_t c = k.channels, bytes = (c + 7) / 8, step = pixels_at_once<T>(c);
    clear(sums, 2 * c);
    for (int64_t p = k.first; p < k.end; p += step)
        for_channels(c, Forward<T, A, R>{x + p * c, R ? residual + p * c : nullptr, y + p * c,
                                         R ? bits + p * bytes : nullptr, bn.scale, bn.shift, bn.running_mean, sums,
                                         sums + c, c, bytes, at_most(step, k.end - p)});
}

template <typename T, Activation A, bool R>
FD2FAST_INLINE void backward_chunk(const Chunk& k, const BatchNorm& bn, const T* x, const T* grad, const uint8_t* bits,
                                   const float* slope, const float* offset, T* grad_x, T* grad_residual) {
    const int64_t c = k.channels, bytes = (c + 7) / 8, step = pixels_at_once<T>(c);
    for (int64_t p = k.first; p < k.end; p += step)
        for_channels(c, Backward<T, A, R>{x + p * c, grad + p * c, R ? bits + p * bytes : nullptr, bn.scale, bn.shift,
                                          slope, offset, grad_x + p * c, R ? grad_residual + p * c : nullptr, c, bytes,
                                          at_most(step, k.end - p)});
}

template <Activation A>
struct Tag {
    static constexpr Activation value = A;
};

template <typename Work>
FD2FAST_INLINE void by_activation(Activation activation, const Work& work) {
    switch (activation) {
        case Activation::identity: return work(Tag<Activation::identity>{});
        case Activation::relu: return work(Tag<Activation::relu>{});
        case Activation::relu6: return work(Tag<Activation::relu6>{});
    }
}

template <typename T>
void forward(const Chunk& chunk, const BatchNorm& bn, const void* source, const void* added, void* result, uint8_t* bits,
             float* sums) {
    const T *x = static_cast<const T*>(source), *residual = static_cast<const T*>(added);
    T* y = static_cast<T*>(result);
    by_activation(bn.activation, [&](auto tag) {
        constexpr Activation A = decltype(tag)::value;
        if (residual != nullptr)
            forward_chunk<T, A, true>(chunk, bn, x, residual, y, bits, sums);
        else
            forward_chunk<T, A, false>(chunk, bn, x, residual, y, bits, sums);
    });
}

template <typename T>
void backward(const Chunk& chunk, const BatchNorm& bn, const void* source, const void* gradient, const uint8_t* bits,
              const float* slope, const float* offset, void* result, void* added) {
    const T *x = static_cast<const T*>(source), *grad = static_cast<const T*>(gradient);
    T *grad_x = static_cast<T*>(result), *grad_residual = static_cast<T*>(added);
    by_activation(bn.activation, [&](auto tag) {
        constexpr Activation A = decltype(tag)::value;
        if (grad_residual != nullptr)
            backward_chunk<T, A, true>(chunk, bn, x, grad, bits, slope, offset, grad_x, grad_residual);
        else
            backward_chunk<T, A, false>(chunk, bn, x, grad, bits, slope, offset, grad_x, grad_residual);
    });
}

template <typename T>
void sums(const Chunk& chunk, const void* x, const float* origin, float* found) {
    const int64_t c = chunk.channels, step = pixels_at_once<T>(c);
    clear(found, 2 * c);
    for (int64_t p = chunk.first; p < chunk.end; p += step)
        for_channels(c, Sums<T>{static_cast<const T*>(x) + p * c, origin, found, found + c, c, at_most(step, chunk.end - p)});
}

template <typename T>
void affine(const Chunk& chunk, const void* x, const float* slope, const float* offset, void* out) {
    const int64_t c = chunk.channels;
    for (int64_t p = chunk.first; p < chunk.end; ++p)
        for_channels(c, Affine<T>{static_cast<const T*>(x) + p * c, slope, offset, static_cast<T*>(out) + p * c});
}

template <typename T>
void join(const Chunk& chunk, const BatchNorm& bn, const Part& part, void* result) {
    const T* x = static_cast<const T*>(part.map);
    T* y = static_cast<T*>(result) + part.first;
    const float *scale = bn.scale + part.first, *shift = bn.shift + part.first;
    by_activation(bn.activation, [&](auto tag) {
        for (int64_t p = chunk.first; p < chunk.end; ++p)
            for_channels(part.channels, ScaleShift<T, decltype(tag)::value>{x + p * part.channels, y + p * chunk.channels,
                                                                            scale, shift});
    });
}

template <typename T>
void split(const Chunk& chunk, const BatchNorm& bn, const Part& part, const void* gradient, void* result) {
    const T *x = static_cast<const T*>(part.map), *grad = static_cast<const T*>(gradient) + part.first;
    T* out = static_cast<T*>(result);
    const float *scale = bn.scale + part.first, *shift = bn.shift + part.first;
    by_activation(bn.activation, [&](auto tag) {
        for (int64_t p = chunk.first; p < chunk.end; ++p)
            for_channels(part.channels,
                         ScaleShiftGrad<T, decltype(tag)::value>{x + p * part.channels, grad + p * chunk.channels,
                                                                 out + p * part.channels, scale, shift});
    });
}

constexpr int most_taps = 256;  // pixels of the largest window

// What one pixel is made from: the other's offset in its image, and the place within the window.
struct Taps {
    int64_t at[most_taps];
    int32_t place[most_taps];
    int count = 0;

    FD2FAST_INLINE void add(int64_t offset, int64_t where) {
        at[count] = offset;
        place[count++] = static_cast<int32_t>(where);
    }
};

// Places of a window along one axis, from the first that lies inside to behind the last.
FD2FAST_INLINE void inside(const Window& w, int axis, int64_t start, int64_t& first, int64_t& end) {
    for (first = 0; first < w.kernel[axis] && start + first * w.dilation[axis] < 0;) ++first;
    for (end = w.kernel[axis]; end > first && start + (end - 1) * w.dilation[axis] >= w.in[axis];) --end;
}

// One output pixel: the first maximum of its window.
template <typename T>
struct PoolPixel {
    const Taps& taps;
    const T* x;  // the image
    T* y;
    uint8_t* places;

    template <int W>
    FD2FAST_INLINE void run(int64_t c) const {
        F<W> best = F<W>{} - __builtin_inff();
        I<W> place = {};
        for (int k = 0; k < taps.count; ++k) {
            const F<W> v = load<W>(x + taps.at[k] + c);
            const I<W> better = (I<W>)(v > best) | (I<W>)(v != v);
            best = better ? v : best;
            place = better ? I<W>{} + taps.place[k] : place;
        }
        store<W>(y + c, best);
        const auto bytes = narrow<W>(place);
        std::memcpy(places + c, &bytes, W);
    }
};

template <typename T>
void pool_row(const Window& w, int64_t channels, int64_t row, const void* source, void* result, uint8_t* places) {
    const T* x = static_cast<const T*>(source);
    T* y = static_cast<T*>(result);
    const int64_t image = row / w.out[0], i = row % w.out[0], top = i * w.stride[0] - w.padding[0];
    const T* from = x + image * w.in[0] * w.in[1] * channels;
    int64_t a, b, c, d;
    inside(w, 0, top, a, b);
    for (int64_t j = 0; j < w.out[1]; ++j) {
        const int64_t left = j * w.stride[1] - w.padding[1], at = (row * w.out[1] + j) * channels;
        inside(w, 1, left, c, d);
        Taps taps;
        for (int64_t p = a; p < b; ++p)
            for (int64_t q = c; q < d; ++q)
                taps.add(((top + p * w.dilation[0]) * w.in[1] + left + q * w.dilation[1]) * channels, p * w.kernel[1] + q);
        for_channels(channels, PoolPixel<T>{taps, from, y + at, places + at});
    }
}

// One input pixel: the sum over the windows whose maximum it is.
template <typename T>
struct UnpoolPixel {
    const Taps& taps;
    const T* grad;  // the image's
    const uint8_t* places;
    T* out;

    template <int W>
    FD2FAST_INLINE void run(int64_t c) const {
        F<W> sum = {};
        for (int k = 0; k < taps.count; ++k) {
            typename Lanes<W>::B bytes;
            std::memcpy(&bytes, places + taps.at[k] + c, W);
            const I<W> here = (I<W>)(widen<W>(bytes) == I<W>{} + taps.place[k]);
            sum += masked<W>(load<W>(grad + taps.at[k] + c), here);
        }
        store<W>(out + c, sum);
    }
};

// The windows along one axis that may hold an input index, moved on from index to index without a division.
struct Holders {
    const Window& w;
    int axis;
    int64_t first, behind;  // windows; may lie outside the output
    int64_t to_first, to_behind;

    FD2FAST_INLINE Holders(const Window& window, int along, int64_t v) : w(window), axis(along) {
        const int64_t s = w.stride[axis], u = v + w.padding[axis], over = u - (w.kernel[axis] - 1) * w.dilation[axis];
        first = over <= 0 ? 0 : (over + s - 1) / s;
        to_first = first * s - over;
        behind = u / s + 1;
        to_behind = behind * s - u;
    }

    FD2FAST_INLINE void move() {
        if (--to_first < 0) {
            ++first;
            to_first += w.stride[axis];
        }
        if (--to_behind == 0) {
            ++behind;
            to_behind = w.stride[axis];
        }
    }

    FD2FAST_INLINE int64_t end() const { return behind < w.out[axis] ? behind : w.out[axis]; }

    // The place of input index v in a window, or -1 where a dilated window steps over it.
    FD2FAST_INLINE int64_t place(int64_t v, int64_t window) const {
        const int64_t at = v + w.padding[axis] - window * w.stride[axis];
        if (w.dilation[axis] == 1) return at;
        return at % w.dilation[axis] == 0 ? at / w.dilation[axis] : -1;
    }
};

// Calls body(input index, taps) for each pixel of an input row, counted over all images: its windows, by their offsets in the
// output's image, and its places within them.
template <typename Body>
FD2FAST_INLINE void for_holders(const Window& w, int64_t channels, int64_t row, const Body& body) {
    const int64_t i = row % w.in[0];
    const Holders down(w, 0, i);
    Taps rows;
    for (int64_t a = down.first; a < down.end(); ++a) {
        const int64_t place = down.place(i, a);
        if (place >= 0) rows.add(a * w.out[1], place * w.kernel[1]);
    }
    Holders right(w, 1, 0);
    for (int64_t j = 0; j < w.in[1]; ++j, right.move()) {
        Taps taps;
        for (int64_t b = right.first; b < right.end(); ++b) {
            const int64_t place = right.place(j, b);
            if (place < 0) continue;
            for (int k = 0; k < rows.count; ++k) taps.add((rows.at[k] + b) * channels, rows.place[k] + place);
        }
        body(row * w.in[1] + j, taps);
    }
}

template <typename T>
void unpool_row(const Window& w, int64_t channels, int64_t row, const void* source, const uint8_t* places, void* result) {
    const int64_t from = row / w.in[0] * w.out[0] * w.out[1] * channels;
    const T* grad = static_cast<const T*>(source) + from;
    T* grad_x = static_cast<T*>(result);
    for_holders(w, channels, row, [&](int64_t pixel, const Taps& taps) {
        for_channels(channels, UnpoolPixel<T>{taps, grad, places + from, grad_x + pixel * channels});
    });
}

// One input pixel: the sum over its windows, each times the weight of its place.
template <typename T>
struct DepthwisePixel {
    const Taps& taps;
    const T* grad;        // the image's
    const float* weight;  // [places, channels]
    T* out;
    int64_t channels;

    template <int W>
    FD2FAST_INLINE void run(int64_t c) const {
        F<W> sum = {};
        for (int k = 0; k < taps.count; ++k)
            sum += load<W>(grad + taps.at[k] + c) * load<W>(weight + taps.place[k] * channels + c);
        store<W>(out + c, sum);
    }
};

template <typename T>
void depthwise_row(const Window& w, int64_t channels, int64_t row, const void* source, const float* weight, void* result) {
    const T* grad = static_cast<const T*>(source) + row / w.in[0] * w.out[0] * w.out[1] * channels;
    T* grad_x = static_cast<T*>(result);
    for_holders(w, channels, row, [&](int64_t pixel, const Taps& taps) {
        for_channels(channels, DepthwisePixel<T>{taps, grad, weight, grad_x + pixel * channels, channels});
    });
}

// One piece of sum (z - c)^2 after the other, in four sums, so that additions do not wait for each other.
void distances(int64_t rows, int64_t dims, const float* z, const float* c, float* out, int64_t step) {
    constexpr int W = widest;
    for (int64_t n = 0; n < rows; ++n) {
        const float* own = z + n * dims;
        F<W> sums[4] = {};
        int64_t d = 0;
        for (; d + 4 * W <= dims; d += 4 * W)
            for (int i = 0; i < 4; ++i) {
                const F<W> apart = load<W>(own + d + i * W) - load<W>(c + d + i * W);
                sums[i] += apart * apart;
            }
        const F<W> all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        float sum = 0.0f;
        for (int i = 0; i < W; ++i) sum += all[i];
        for (; d < dims; ++d) sum += (own[d] - c[d]) * (own[d] - c[d]);
        out[n * step] = __builtin_sqrtf(sum);
    }
}

void pull(int64_t rows, int64_t classes, int64_t dims, int64_t first, int64_t end, const float* z, const float* prototypes,
          const float* weights, float* out) {
    constexpr int W = widest;
    for (int64_t n = 0; n < rows; ++n) {
        const float *own = z + n * dims, *by = weights + n * classes;
        int64_t d = first;
        for (; d + 4 * W <= end; d += 4 * W) {
            F<W> sums[4] = {}, here[4];
            for (int i = 0; i < 4; ++i) here[i] = load<W>(own + d + i * W);
            for (int64_t k = 0; k < classes; ++k) {
                const float* c = prototypes + k * dims + d;
                for (int i = 0; i < 4; ++i) sums[i] += by[k] * (here[i] - load<W>(c + i * W));
            }
            for (int i = 0; i < 4; ++i) store<W>(out + n * dims + d + i * W, sums[i]);
        }
        for (; d < end; ++d) {
            float sum = 0.0f;
            for (int64_t k = 0; k < classes; ++k) sum += by[k] * (own[d] - prototypes[k * dims + d]);
            out[n * dims + d] = sum;
        }
    }
}

template <int W>
FD2FAST_INLINE F<W> square_root(F<W> v) {
#ifdef __AVX512F__
    if constexpr (W == 16) return (F<W>)_mm512_sqrt_ps((__m512)v);
#endif
#ifdef __AVX__
    if constexpr (W == 8) return (F<W>)_mm256_sqrt_ps((__m256)v);
#endif
    F<W> root;
    for (int i = 0; i < W; ++i) root[i] = __builtin_sqrtf(v[i]);
    return root;
}

template <int W>
FD2FAST_INLINE F<W> magnitude(F<W> v) {
    return (F<W>)((I<W>)v & 0x7fffffff);
}

// The sum of body.run<W>(c) over all c, in four sums, so that additions do not wait for each other.
template <typename Body>
FD2FAST_INLINE double summed(int64_t dims, const Body& body) {
    constexpr int W = widest;
    F<W> sums[4] = {};
    int64_t c = 0;
    for (; c + 4 * W <= dims; c += 4 * W)
        for (int i = 0; i < 4; ++i) sums[i] += body.template run<W>(c + i * W);
    const F<W> all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double sum = 0.0;
    for (int i = 0; i < W; ++i) sum += all[i];
    for (; c < dims; ++c) sum += body.template run<1>(c)[0];
    return sum;
}

// sign(x) sqrt(|x| + eps), 0 at 0, and its square. NaN passes.
struct Root {
    const float* x;
    float* z;
    float eps;

    template <int W>
    FD2FAST_INLINE F<W> run(int64_t c) const {
        const F<W> v = load<W>(x + c), size = magnitude<W>(v);
        const F<W> root = (F<W>)((I<W>)square_root<W>(size + eps) | ((I<W>)v & (I<W>{} - 0x7fffffff - 1)));
        const F<W> r = masked<W>(root, (I<W>)(v != F<W>{}));
        store<W>(z + c, r);
        return r * r;
    }
};

struct Scaled {
    float* z;
    float by;

    template <int W>
    FD2FAST_INLINE void run(int64_t c) const {
        store<W>(z + c, load<W>(z + c) / by);
    }
};

struct Product {
    const float *a, *b;

    template <int W>
    FD2FAST_INLINE F<W> run(int64_t c) const {
        return load<W>(a + c) * load<W>(b + c);
    }
};

struct RootGrad {
    const float *x, *z, *grad;
    float* grad_x;
    float eps, norm, along;

    template <int W>
    FD2FAST_INLINE void run(int64_t c) const {
        const F<W> v = load<W>(x + c);
        const F<W> across = (load<W>(grad + c) - load<W>(z + c) * along) / norm;
        const F<W> slope = (F<W>{} + 0.5f) / square_root<W>(magnitude<W>(v) + eps);
        store<W>(grad_x + c, masked<W>(across * slope, (I<W>)(v != F<W>{})));
    }
};

float unit_root(int64_t dims, float eps, const float* x, float* z) {
    const double norm = __builtin_sqrt(summed(dims, Root{x, z, eps}));
    const float by = norm < 1e-12 ? 1e-12f : static_cast<float>(norm);
    for_channels(dims, Scaled{z, by});
    return by;
}

void unit_root_grad(int64_t dims, float eps, float norm, const float* x, const float* z, const float* grad, float* grad_x) {
    const float along = static_cast<float>(summed(dims, Product{z, grad}));
    for_channels(dims, RootGrad{x, z, grad, grad_x, eps, norm, along});
}

constexpr VectorKernels all_vector_kernels = {distances, pull, unit_root, unit_root_grad};

template <typename T>
constexpr Kernels kernels_for = {forward<T>, backward<T>, sums<T>,  affine<T>,    join<T>, split<T>, pool_row<T>, unpool_row<T>,
                                 depthwise_row<T>};

}  // namespace

namespace FD2FAST_ISA {
const Kernels& kernels(Type type) {
    return type == Type::float32 ? kernels_for<float> : kernels_for<bfloat16>;
}
const VectorKernels& vector_kernels() { return all_vector_kernels; }
}  // namespace FD2FAST_ISA

}  // namespace fd2fast::frozen
