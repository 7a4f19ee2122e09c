// Vectors of W values and their loads and stores in fp32 and bf16. Included by the files that are compiled for each instruction set:
// nothing from the standard library is instantiated here, the linker could hand such a copy to a machine without the set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FD2FAST_MASKS
#endif

#define FD2FAST_INLINE inline __attribute__((always_inline))

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are never passed between functions that are not inlined
#endif

namespace fd2fast {
namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

struct bfloat16 {
    uint16_t bits;
};

// The most lanes worth a vector: one that is wider than the registers goes through memory (GCC 12: max pooling on AVX2 12 -> 2 ms).
#if defined(__AVX512F__)
constexpr int widest = 16;
#else
constexpr int widest = 8;
#endif

// W values of a type side by side.
template <int W>
struct Lanes {
    typedef float F __attribute__((vector_size(W * 4)));
    typedef uint32_t U __attribute__((vector_size(W * 4)));
    typedef int32_t I __attribute__((vector_size(W * 4)));
    typedef uint16_t H __attribute__((vector_size(W * 2)));
    typedef uint8_t B __attribute__((vector_size(W)));
};

template <int W>
using F = typename Lanes<W>::F;
template <int W>
using I = typename Lanes<W>::I;

template <int W>
FD2FAST_INLINE F<W> load(const float* p) {
    F<W> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <int W>
FD2FAST_INLINE F<W> load(const bfloat16* p) {
    typename Lanes<W>::H h;
    std::memcpy(&h, p, sizeof h);
    return (F<W>)(__builtin_convertvector(h, typename Lanes<W>::U) << 16);
}

template <int W>
FD2FAST_INLINE void store(float* p, F<W> v) {
    std::memcpy(p, &v, sizeof v);
}

// The bits of bf16 values, each in 32: to the nearest, ties to even; NaN stays NaN.
template <int W>
FD2FAST_INLINE typename Lanes<W>::U rounded_bits(F<W> v) {
    using U = typename Lanes<W>::U;
    const U u = (U)v;
    const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (v == v) ? rounded : ((u >> 16) | 0x40u);
}

// To the nearest, ties to even; NaN stays NaN. The processor's own conversion, where it has one, takes values below 2^-126 for 0.
template <int W>
FD2FAST_INLINE void store(bfloat16* p, F<W> v) {
#ifdef __AVX512BF16__
    if constexpr (W == 16) {
        const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
        std::memcpy(p, &h, sizeof h);
        return;
    } else if constexpr (W == 8) {
        const __m128bh h = _mm256_cvtneps_pbh((__m256)v);
        std::memcpy(p, &h, sizeof h);
        return;
    }
#endif
    const auto h = __builtin_convertvector(rounded_bits<W>(v), typename Lanes<W>::H);
    std::memcpy(p, &h, sizeof h);
}

}  // namespace
}  // namespace fd2fast
