// Vectors of LANES float32 numbers, and the float operations of the engine: conversion, exp, sums, rounding.
//
// A token must get the same bits alone and among others. So the order of every sum is fixed in the source, products are
// accumulated by an explicit fused multiply-add, and a function whose sums the compiler orders (`omp simd`) is compiled
// only once (NOINLINE): inlined in two places, its multiplications and additions may be fused in two different ways.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define NOINLINE __attribute__((noinline))

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using FloatVec = float __attribute__((vector_size(4 * LANES)));
struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// Weights are prefetched into the second-level cache this many bytes ahead. The hardware prefetcher stops at every 4
// KiB page, and a step reads each weight once: reading from memory is half as fast again with it (measured on Sapphire
// Rapids). Beyond the end of a matrix a prefetch does nothing.
constexpr int PREFETCH_BYTES = 4096;
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
template <class T>
inline void prefetch_row(const T* row, size_t count) {
    for (size_t at = 0; at < count * sizeof(T); at += 64) prefetch((const char*)row + at);
}

inline FloatVec broadcast(float value) { return value - FloatVec{}; }
inline FloatVec load_floats(const float* p) {
    FloatVec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}
inline void store_floats(float* p, FloatVec v) { std::memcpy(p, &v, sizeof(v)); }

// fmadd(a, b, c) is a * b + c, rounded once where the processor has a fused multiply-add.
#if defined(__AVX512F__)
inline FloatVec fmadd(FloatVec a, FloatVec b, FloatVec c) {
    return (FloatVec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline FloatVec load_floats(const int8_t* p) {
    return (FloatVec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline FloatVec load_floats(const bfloat16* p) {
    return (FloatVec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline FloatVec load_floats(const float16* p) {
    return (FloatVec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
inline FloatVec fmadd(FloatVec a, FloatVec b, FloatVec c) {
    return (FloatVec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline FloatVec load_floats(const int8_t* p) {
    return (FloatVec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline FloatVec load_floats(const bfloat16* p) {
    return (FloatVec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline FloatVec load_floats(const float16* p) { return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
#else
#if defined(__aarch64__)
inline FloatVec fmadd(FloatVec a, FloatVec b, FloatVec c) {
    return (FloatVec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline FloatVec load_floats(const float16* p) {
    return (FloatVec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
}
#else
inline FloatVec fmadd(FloatVec a, FloatVec b, FloatVec c) { return a * b + c; }
#endif
inline float as_float(int8_t value) { return float(value); }
inline float as_float(bfloat16 value);
inline float as_float(float16 value);
template <class E>
inline FloatVec load_floats(const E* p) {
    FloatVec v{};
    for (int i = 0; i < LANES; i++) v[i] = as_float(p[i]);
    return v;
}
#endif

inline float as_float(float value) { return value; }
inline float as_float(bfloat16 value) {  // bfloat16 is the upper half of a float32
    return std::bit_cast<float>(uint32_t(value.bits) << 16);
}
#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif
inline float as_float(float16 value) {
    Half half;
    std::memcpy(&half, &value, 2);
    return float(half);
}
// Values beyond float16's range become its largest number; infinity and NaN become NaN.
inline float16 to_float16(float value) {
    const Half half = Half(std::min(std::max(value, -65504.0f), 65504.0f) + (value - value));
    float16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

// Lane i of the result is lane i ^ HALF.
template <int HALF, int... L>
inline FloatVec swap_halves(FloatVec v, std::integer_sequence<int, L...>) {
    return __builtin_shufflevector(v, v, (L ^ HALF)...);
}
// Combines the halves of a vector, then the halves of that half, down to one number.
template <int HALF = LANES / 2, class Combine>
inline float fold(FloatVec v, Combine combine) {
    v = combine(v, swap_halves<HALF>(v, std::make_integer_sequence<int, LANES>{}));
    if constexpr (HALF > 1) return fold<HALF / 2>(v, combine);
    else return v[0];
}
inline float horizontal_sum(FloatVec v) {
    return fold(v, [](FloatVec x, FloatVec y) { return x + y; });
}
inline float horizontal_max(FloatVec v) {
    return fold(v, [](FloatVec x, FloatVec y) { return x > y ? x : y; });
}

// exp(x) with a relative error of at most 1e-5 at the ends of the range and 2e-7 near zero: 2^n times a polynomial of
// the fraction. It has no branches and no table, so compilers vectorize loops over it.
inline float fast_exp(float x) {
    x = std::min(88.0f, std::max(-87.0f, x)) * 1.44269504f;
    const float n = std::floor(x + 0.5f), f = (x - n) * 0.693147181f;
    const float p =
        1.0f +
        f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (8.33333e-3f + f * 1.388889e-3f)))));
    return std::bit_cast<float>((int32_t(n) + 127) << 23) * p;
}

NOINLINE inline float sum_of_squares(const float* x, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

// The largest magnitude, NaN where there is one. Compared as integers, the bits of magnitudes are in the order of the
// magnitudes, and a NaN is above infinity.
inline float abs_max(const float* x, int n) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < n; i++) largest = std::max(largest, std::bit_cast<int32_t>(x[i]) & INT32_MAX);
    return std::bit_cast<float>(largest);
}

// The nearest integer in [-limit, limit], ties to even. A NaN becomes -limit, because its conversion is undefined; the
// scale that belongs to such a code is NaN, so the NaN is not lost.
inline int32_t round_clamped(float value, float limit) {
    return int32_t(std::nearbyint(std::min(limit, std::max(-limit, value))));
}
