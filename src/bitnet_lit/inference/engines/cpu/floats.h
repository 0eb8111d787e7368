// Sums over floats, sixteen at a time. The vectors are the compiler's own, so one source serves every processor; no option
// lets the compiler change the order of a sum, so a token alone and a token among many get the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Inlined in two places, the compiler may contract a sum in two ways; one token must not differ from one of many.
#define ONCE __attribute__((noinline))

constexpr int LANES = 16;
using Floats = float __attribute__((vector_size(64)));
struct bfloat16 { uint16_t bits; };

inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }
inline int padded(int inputs) { return round_up(inputs, 64); }  // whole vectors of every width

inline Floats load_floats(const float* p) { Floats v; std::memcpy(&v, p, sizeof(v)); return v; }
#if defined(__AVX512F__)  // of the loops below, which others compile well, GCC makes 128-bit pieces here
inline Floats load_floats(const int8_t* p) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline Floats load_floats(const bfloat16* p) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
#else
inline Floats load_floats(const int8_t* p) {
    Floats v;
    for (int i = 0; i < LANES; i++) v[i] = float(p[i]);
    return v;
}
inline Floats load_floats(const bfloat16* p) {
    using Words = uint32_t __attribute__((vector_size(64)));
    Words v;
    for (int i = 0; i < LANES; i++) v[i] = uint32_t(p[i].bits) << 16;  // the upper half of a float
    return (Floats)v;
}
#endif
inline void store_floats(float* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }
inline float as_float(float value) { return value; }
inline float as_float(bfloat16 value) { const uint32_t word = uint32_t(value.bits) << 16; float f; std::memcpy(&f, &word, 4); return f; }

inline float sum_of_lanes(Floats v) {
    float lanes[LANES];
    store_floats(lanes, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// One row of a dense matrix times T tokens, x of `stride` floats a token.
template <int T, class W>
inline void dense_dots(const W* w, const float* x, size_t stride, int n, float* out) {
    Floats even[T], odd[T];  // independent chains of additions
    for (int t = 0; t < T; t++) even[t] = odd[t] = Floats{};
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        __builtin_prefetch((const char*)(w + i) + 4096, 0, 2);  // as in kernels.h
        const Floats a = load_floats(w + i), b = load_floats(w + i + LANES);
        for (int t = 0; t < T; t++) even[t] += a * load_floats(x + t * stride + i), odd[t] += b * load_floats(x + t * stride + i + LANES);
    }
    for (int t = 0; t < T; t++) {
        float sum = sum_of_lanes(even[t] + odd[t]);
        for (int j = i; j < n; j++) sum += as_float(w[j]) * x[t * stride + j];
        out[t] = sum;
    }
}

constexpr int DENSE_TOKENS = 4;

template <class W>
ONCE void dense_row(const W* w, const float* x, size_t stride, int tokens, int n, float* out) {
    int t = 0;
    for (; t + DENSE_TOKENS <= tokens; t += DENSE_TOKENS) dense_dots<DENSE_TOKENS>(w, x + t * stride, stride, n, out + t);
    for (; t < tokens; t++) dense_dots<1>(w, x + t * stride, stride, n, out + t);
}

// exp to 2e-7 relative, in a form that compilers turn into vector code: 2^n times a polynomial of the fraction.
inline float fast_exp(float x) {
    x = std::min(88.0f, std::max(-87.0f, x)) * 1.44269504f;
    const float n = std::floor(x + 0.5f), f = (x - n) * 0.693147181f;
    const float p =
        1.0f + f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (8.33333e-3f + f * 1.388889e-3f)))));
    union { int32_t i; float f; } two = {(int32_t(n) + 127) << 23};
    return two.f * p;
}

ONCE inline float sum_of_squares(const float* x, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

inline float largest_magnitude(const float* x, int n) {
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < n; i++) largest = std::max(largest, std::fabs(x[i]));
    return largest;
}

template <class T>
struct Buffer {  // aligned to cache lines, zeroed
    T* data = nullptr;
    explicit Buffer(size_t count = 0) { reset(count); }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    void reset(size_t count) {
        std::free(data);
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        data = bytes ? (T*)std::aligned_alloc(64, bytes) : nullptr;
        if (data) std::memset((void*)data, 0, bytes);
    }
    operator T*() const { return data; }
};
