// Vectors of floats, LANES at a time, and what the engine needs of them. The order of every sum is fixed in the source
// and products are added by an explicit fused multiply-add, so a token alone and a token among many get the same bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include <sys/mman.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Inlined in two places, the compiler may contract a sum in two ways; one token must not differ from one of many.
#define ONCE __attribute__((noinline))

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using Floats = float __attribute__((vector_size(4 * LANES)));
struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }
inline int padded(int inputs) { return round_up(inputs, 64); }  // whole vectors of every width

// How far ahead weights are asked for, into the second cache: the hardware's own prefetching stops at every 4 KiB page,
// and a step reads each weight once. Half as fast again from memory (Sapphire Rapids); beyond the end of a matrix it is
// a no-op.
constexpr int AHEAD = 4096;
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
template <class T>
inline void prefetch(const T* row, int count) {  // all of a row
    for (size_t at = 0; at < size_t(count) * sizeof(T); at += 64) prefetch((const char*)row + at);
}

inline Floats all(float value) { return value - Floats{}; }
inline Floats load_floats(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}
inline void store_floats(float* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }

#if defined(__AVX512F__)
inline Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Floats load_floats(const int8_t* p) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline Floats load_floats(const bfloat16* p) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline Floats load_floats(const float16* p) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
inline Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Floats load_floats(const int8_t* p) {
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline Floats load_floats(const bfloat16* p) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline Floats load_floats(const float16* p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
#else
#if defined(__aarch64__)
inline Floats fused(Floats a, Floats b, Floats c) {
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline Floats load_floats(const float16* p) {
    return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
}
#else
inline Floats fused(Floats a, Floats b, Floats c) { return a * b + c; }
#endif
inline float as_float(int8_t value) { return float(value); }
inline float as_float(bfloat16 value);
inline float as_float(float16 value);
template <class E>
inline Floats load_floats(const E* p) {
    Floats v{};
    for (int i = 0; i < LANES; i++) v[i] = as_float(p[i]);
    return v;
}
#endif

inline float as_float(float value) { return value; }
inline float as_float(bfloat16 value) {  // the upper half of a float
    const uint32_t word = uint32_t(value.bits) << 16;
    float f;
    std::memcpy(&f, &word, 4);
    return f;
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
inline float16 to_float16(float value) {  // the largest there is for what is larger; for infinity, as for NaN, a NaN
    const Half half = Half(std::min(std::max(value, -65504.0f), 65504.0f) + (value - value));
    float16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

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
    constexpr int CHAINS = 4;  // independent chains of additions
    Floats sums[T][CHAINS]{};
    int i = 0;
    for (; i + CHAINS * LANES <= n; i += CHAINS * LANES) {
        prefetch((const char*)(w + i) + AHEAD);
        for (int c = 0; c < CHAINS; c++) {
            const Floats weights = load_floats(w + i + c * LANES);
            for (int t = 0; t < T; t++)
                sums[t][c] = fused(weights, load_floats(x + t * stride + i + c * LANES), sums[t][c]);
        }
    }
    for (int t = 0; t < T; t++) {
        float sum = sum_of_lanes((sums[t][0] + sums[t][1]) + (sums[t][2] + sums[t][3]));
        for (int j = i; j < n; j++) sum = std::fma(as_float(w[j]), x[t * stride + j], sum);
        out[t] = sum;
    }
}

constexpr int DENSE_TOKENS = LANES == 16 ? 4 : 2;

template <class W>
inline void dense_row(const W* w, const float* x, size_t stride, int tokens, int n, float* out) {
    int t = 0;
    for (; t + DENSE_TOKENS <= tokens; t += DENSE_TOKENS)
        dense_dots<DENSE_TOKENS>(w, x + t * stride, stride, n, out + t);
    for (; t < tokens; t++) dense_dots<1>(w, x + t * stride, stride, n, out + t);
}

// exp to 1e-5 relative at the ends, 2e-7 near zero, in a form that compilers turn into vector code: 2^n times a
// polynomial of the fraction.
inline float fast_exp(float x) {
    x = std::min(88.0f, std::max(-87.0f, x)) * 1.44269504f;
    const float n = std::floor(x + 0.5f), f = (x - n) * 0.693147181f;
    const float p =
        1.0f +
        f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (8.33333e-3f + f * 1.388889e-3f)))));
    union {
        int32_t i;
        float f;
    } two = {(int32_t(n) + 127) << 23};
    return two.f * p;
}

ONCE inline float sum_of_squares(const float* x, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

// NaN where there is one: as whole numbers, the bits of magnitudes are in the order of the magnitudes, NaN above
// infinity.
inline float largest_magnitude(const float* x, int n) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < n; i++) largest = std::max(largest, std::bit_cast<int32_t>(x[i]) & INT32_MAX);
    return std::bit_cast<float>(largest);
}

// The nearest whole number within [-limit, limit]. A NaN is -limit, because converting it is undefined; it goes on in
// the scale that belongs to the code, which is a NaN too.
inline int32_t code_of(float value, float limit) {
    return int32_t(std::nearbyint(std::min(limit, std::max(-limit, value))));
}

template <class T>
struct Buffer {  // zeroed, aligned to cache lines; large ones on huge pages where the system has them
    T* data = nullptr;
    size_t bytes = 0;
    explicit Buffer(size_t count = 0) { reset(count); }
    ~Buffer() { reset(0); }
    Buffer(const Buffer&) = delete;
    void reset(size_t count) {
        if (data && bytes >= MAPPED) munmap((void*)data, bytes);
        else std::free(data);
        data = nullptr, bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes >= MAPPED) {
            void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (memory == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
            madvise(memory, bytes, MADV_HUGEPAGE);
#endif
            data = (T*)memory;
        } else if (bytes) {
            data = (T*)std::aligned_alloc(64, bytes);
            if (!data) throw std::bad_alloc();
            std::memset((void*)data, 0, bytes);
        }
    }
    operator T*() const { return data; }

   private:
    static constexpr size_t MAPPED = 1 << 21;
};
