// The few vector operations that the kernels need, for x86 (AVX-512 VNNI, AVX2) and ARM (NEON dot product), and as plain
// loops for everything else. A vector holds W bytes; products of bytes are summed in fours into 32-bit lanes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define SIMD_NAME "avx512-vnni"

namespace simd {
constexpr int W = 64;
using Bytes = __m512i;
using Sums = __m512i;
inline Bytes load(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes four(const int8_t* p) { int32_t v; std::memcpy(&v, p, 4); return _mm512_set1_epi32(v); }
inline void store(int32_t* p, Sums a) { _mm512_storeu_si512(p, a); }
inline Sums zero() { return _mm512_setzero_si512(); }
inline Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline int32_t total(Sums a) { return _mm512_reduce_add_epi32(a); }
// Codes of bit pair K, 0..2, still times 4^K: the factor is taken out of the sum.
template <int K> inline Bytes scaled_pair(Bytes w) { return _mm512_and_si512(w, _mm512_set1_epi8(char(3 << 2 * K))); }
template <int K> inline Sums unscale(Sums a) { return _mm512_srai_epi32(a, 2 * K); }
template <int K> inline Bytes pair(Bytes w) {
    return _mm512_and_si512(_mm512_srli_epi16(w, 2 * K), _mm512_set1_epi8(3));
}
inline Sums dot_unsigned(Sums acc, Bytes codes, Bytes x) { return _mm512_dpbusd_epi32(acc, codes, x); }
// Signed weights: the instruction wants one side unsigned, so 128 is added to them and 128 * sum(x) comes out too much.
constexpr int SIGNED_OFFSET = 128;
inline Sums dot_signed(Sums acc, Bytes w, Bytes x) {
    return _mm512_dpbusd_epi32(acc, _mm512_xor_si512(w, _mm512_set1_epi8(char(0x80))), x);
}
}  // namespace simd

#elif defined(__AVX2__)
#include <immintrin.h>
#define SIMD_NAME "avx2"

namespace simd {
constexpr int W = 32;
using Bytes = __m256i;
using Sums = __m256i;
inline Bytes load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Bytes four(const int8_t* p) { int32_t v; std::memcpy(&v, p, 4); return _mm256_set1_epi32(v); }
inline void store(int32_t* p, Sums a) { _mm256_storeu_si256((__m256i*)p, a); }
inline Sums zero() { return _mm256_setzero_si256(); }
inline Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
inline int32_t total(Sums a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1));
    return _mm_cvtsi128_si32(s);
}
template <int K> inline Bytes pair(Bytes w) {
    return _mm256_and_si256(_mm256_srli_epi16(w, 2 * K), _mm256_set1_epi8(3));
}
template <int K> inline Bytes scaled_pair(Bytes w) { return _mm256_and_si256(w, _mm256_set1_epi8(char(3 << 2 * K))); }
template <int K> inline Sums unscale(Sums a) { return _mm256_srai_epi32(a, 2 * K); }
// The largest pair of products is 2 * 128 * 128 = 32768, one more than 16 bits hold; activations stop at -127.
inline Sums dot_unsigned(Sums acc, Bytes codes, Bytes x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}
constexpr int SIGNED_OFFSET = 0;
inline Sums dot_signed(Sums acc, Bytes w, Bytes x) {
    const __m256i low = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(w)),
                                          _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x)));
    const __m256i high = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(w, 1)),
                                           _mm256_cvtepi8_epi16(_mm256_extracti128_si256(x, 1)));
    return _mm256_add_epi32(acc, _mm256_add_epi32(low, high));
}
}  // namespace simd

#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define SIMD_NAME "neon-dotprod"

namespace simd {
constexpr int W = 16;
using Bytes = uint8x16_t;
using Sums = int32x4_t;
inline Bytes load(const void* p) { return vld1q_u8((const uint8_t*)p); }
inline Bytes four(const int8_t* p) { int32_t v; std::memcpy(&v, p, 4); return vreinterpretq_u8_s32(vdupq_n_s32(v)); }
inline void store(int32_t* p, Sums a) { vst1q_s32(p, a); }
inline Sums zero() { return vdupq_n_s32(0); }
inline Sums add(Sums a, Sums b) { return vaddq_s32(a, b); }
inline int32_t total(Sums a) { return vaddvq_s32(a); }
template <int K> inline Bytes pair(Bytes w) {
    if constexpr (K == 0) return vandq_u8(w, vdupq_n_u8(3));
    else if constexpr (K == 3) return vshrq_n_u8(w, 6);
    else return vandq_u8(vshrq_n_u8(w, 2 * K), vdupq_n_u8(3));
}
// Both sides are signed here, and 2 * 64 would not fit: shift instead.
template <int K> inline Bytes scaled_pair(Bytes w) { return pair<K>(w); }
template <int K> inline Sums unscale(Sums a) { return a; }
inline Sums dot_unsigned(Sums acc, Bytes codes, Bytes x) {
    return vdotq_s32(acc, vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(x));
}
constexpr int SIGNED_OFFSET = 0;
inline Sums dot_signed(Sums acc, Bytes w, Bytes x) {
    return vdotq_s32(acc, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x));
}
}  // namespace simd

#else
#define SIMD_NAME "plain"

namespace simd {
constexpr int W = 16;
struct Bytes { uint8_t b[16]; };
struct Sums { int32_t s[4]; };
inline Bytes load(const void* p) { Bytes v; std::memcpy(&v, p, 16); return v; }
inline Bytes four(const int8_t* p) { Bytes v; for (int i = 0; i < 4; i++) std::memcpy(v.b + 4 * i, p, 4); return v; }
inline void store(int32_t* p, Sums a) { std::memcpy(p, a.s, 16); }
inline Sums zero() { return Sums{}; }
inline Sums add(Sums a, Sums b) { for (int i = 0; i < 4; i++) a.s[i] += b.s[i]; return a; }
inline int32_t total(Sums a) { return a.s[0] + a.s[1] + a.s[2] + a.s[3]; }
template <int K> inline Bytes pair(Bytes w) { for (auto& b : w.b) b = b >> 2 * K & 3; return w; }
template <int K> inline Bytes scaled_pair(Bytes w) { return pair<K>(w); }
template <int K> inline Sums unscale(Sums a) { return a; }
inline Sums dot_unsigned(Sums acc, Bytes codes, Bytes x) {
    for (int i = 0; i < 16; i++) acc.s[i / 4] += int(codes.b[i]) * int(int8_t(x.b[i]));
    return acc;
}
constexpr int SIGNED_OFFSET = 0;
inline Sums dot_signed(Sums acc, Bytes w, Bytes x) {
    for (int i = 0; i < 16; i++) acc.s[i / 4] += int(int8_t(w.b[i])) * int(int8_t(x.b[i]));
    return acc;
}
}  // namespace simd
#endif
