// Vectors of bytes: the few operations that the integer kernels need, for x86 (AVX-512 VNNI, AVX2) and ARM (NEON dot
// product), and as plain loops for everything else. A vector holds W bytes; products of bytes are summed in fours into
// 32-bit lanes (Sums), where the instruction set has it directly, or by way of 16-bit sums (Partial) that are added up
// before they overflow.
//
//     four(p)          the same four bytes in every lane
//     spread(w, c)     the bit pairs of each byte as four vectors of codes, c[k] being pair k times a power of two
//     gather(acc)      the sum of four Partials made with spread's codes, without those powers
//     pair<K>(w)       bit pair K of each byte
//     dot(acc, u, s)   acc + unsigned u times signed s, where u is a code or what spread made of one
//     low_nibbles, high_nibbles: the halves of each byte; NIBBLE_RUN of their products fit into a Partial
//     dot_two(...)     acc + u * s + v * t into Sums, for u and v of 0..63 and any s and t but -128
//
// AVX2, whose products of bytes need a second instruction to be added, has besides what lookup.h needs (SIMD_LOOKUP).
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
using Partial = Sums;
constexpr int RUN = 1 << 20, NIBBLE_RUN = 1 << 20;  // blocks (packing.h) before a Partial is full, and products of nibbles
inline Bytes load(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes four(const void* p) { int32_t v; std::memcpy(&v, p, 4); return _mm512_set1_epi32(v); }
inline void store(void* p, Bytes a) { _mm512_storeu_si512(p, a); }  // or Sums
inline Sums zero() { return _mm512_setzero_si512(); }
inline Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline Sums widen(Partial a) { return a; }
inline void spread(Bytes w, Bytes (&codes)[4]) {
    for (int k = 0; k < 4; k++) codes[k] = _mm512_and_si512(w, _mm512_set1_epi8(char(3 << 2 * k)));
}
inline Sums gather(const Partial (&a)[4]) {
    return add(add(a[0], _mm512_srai_epi32(a[1], 2)), add(_mm512_srai_epi32(a[2], 4), _mm512_srai_epi32(a[3], 6)));
}
template <int K> inline Bytes pair(Bytes w) {
    return _mm512_and_si512(_mm512_srli_epi16(w, 2 * K), _mm512_set1_epi8(3));
}
inline Bytes low_nibbles(Bytes w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes w) { return low_nibbles(_mm512_srli_epi16(w, 4)); }
inline Partial dot(Partial acc, Bytes u, Bytes s) { return _mm512_dpbusd_epi32(acc, u, s); }
inline Sums dot_two(Sums acc, Bytes u, Bytes s, Bytes v, Bytes t) { return dot(dot(acc, u, s), v, t); }
}  // namespace simd

#elif defined(__AVX2__)
#include <immintrin.h>
#define SIMD_NAME "avx2"

namespace simd {
constexpr int W = 32;
using Bytes = __m256i;
using Sums = __m256i;
using Partial = __m256i;  // 16-bit
// In a block a Partial gets four products of codes to 2, or one of codes to 8, each a sum of two: 16 * 4 * 2 * 2 * 127
// and 16 * 2 * 8 * 127 are 32512, and 255 more would not fit.
constexpr int RUN = 16, NIBBLE_RUN = 8;  // 8 * 2 * 15 * 127 is 30480
inline Bytes load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Bytes four(const void* p) { int32_t v; std::memcpy(&v, p, 4); return _mm256_set1_epi32(v); }
inline void store(void* p, Bytes a) { _mm256_storeu_si256((__m256i*)p, a); }  // or Sums
inline Sums zero() { return _mm256_setzero_si256(); }
inline Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
inline Sums widen(Partial a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
inline void spread(Bytes w, Bytes (&codes)[4]) {  // one shift for two pairs; the odd ones stay times 4
    const Bytes high = _mm256_srli_epi16(w, 4), even = _mm256_set1_epi8(3), odd = _mm256_set1_epi8(12);
    codes[0] = _mm256_and_si256(w, even), codes[1] = _mm256_and_si256(w, odd);
    codes[2] = _mm256_and_si256(high, even), codes[3] = _mm256_and_si256(high, odd);
}
inline Sums gather(const Partial (&a)[4]) {
    return add(widen(_mm256_add_epi16(a[0], a[2])), _mm256_srai_epi32(add(widen(a[1]), widen(a[3])), 2));
}
template <int K> inline Bytes pair(Bytes w) {
    return _mm256_and_si256(_mm256_srli_epi16(w, 2 * K), _mm256_set1_epi8(3));
}
inline Bytes low_nibbles(Bytes w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes w) { return low_nibbles(_mm256_srli_epi16(w, 4)); }
inline Partial dot(Partial acc, Bytes u, Bytes s) {
    acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, s));
    asm("" : "+x"(acc));  // GCC would make trees of the additions, for which the registers do not suffice
    return acc;
}
inline Sums dot_two(Sums acc, Bytes u, Bytes s, Bytes v, Bytes t) {  // 2 * 2 * 63 * 127 is 32004
    return add(acc, widen(_mm256_add_epi16(_mm256_maddubs_epi16(u, s), _mm256_maddubs_epi16(v, t))));
}

// What lookup.h needs: sixteen 16-bit numbers in a vector.
#define SIMD_LOOKUP
using Words = __m256i;
inline Words add_words(Words a, Words b) { return _mm256_add_epi16(a, b); }
inline Words sub_words(Words a, Words b) { return _mm256_sub_epi16(a, b); }
inline Words abs_words(Words a) { return _mm256_abs_epi16(a); }
inline bool any_negative(Words a) { return _mm256_movemask_epi8(a) & 0xaaaaaaaa; }
// Sixteen bytes of each of sixteen rows to sixteen columns: four perfect shuffles turn the order of the eight bits of a
// byte's number by four.
inline void columns_of(const int8_t* rows, size_t stride, Words (&columns)[16]) {
    __m128i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm_loadu_si128((const __m128i*)(rows + i * stride));
    const auto shuffle = [](const __m128i (&from)[16], __m128i (&to)[16]) {
        for (int i = 0; i < 8; i++)
            to[2 * i] = _mm_unpacklo_epi8(from[i], from[i + 8]), to[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + 8]);
    };
    shuffle(a, b), shuffle(b, a), shuffle(a, b), shuffle(b, a);
    for (int i = 0; i < 16; i++) columns[i] = _mm256_cvtepi8_epi16(a[i]);
}
// Eight 16-bit numbers of each of eight rows to eight columns, in the same way.
inline void columns_of(const int16_t* rows, size_t stride, Sums (&columns)[8]) {
    __m128i a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = _mm_loadu_si128((const __m128i*)(rows + i * stride));
    const auto shuffle = [](const __m128i (&from)[8], __m128i (&to)[8]) {
        for (int i = 0; i < 4; i++)
            to[2 * i] = _mm_unpacklo_epi16(from[i], from[i + 4]), to[2 * i + 1] = _mm_unpackhi_epi16(from[i], from[i + 4]);
    };
    shuffle(a, b), shuffle(b, a), shuffle(a, b);
    for (int i = 0; i < 8; i++) columns[i] = _mm256_cvtepi16_epi32(b[i]);
}
// Of each byte of a block (64 bytes), four codes + 1 in its bit pairs c0 to c3: 64 times c0 + 3 c1 + 9 c2 + 27 c3, in 16 bits.
inline void set_places(const uint8_t* block, uint64_t* places) {
    const Bytes low = _mm256_set1_epi8(15);
    for (int p = 0; p < 2; p++, places += 8) {
        const Bytes w = load(block + 32 * p);
        const Bytes nines = _mm256_sub_epi8(w, _mm256_and_si256(_mm256_srli_epi16(w, 2), _mm256_set1_epi8(0x33)));  // c0 + 3 c1
        const Bytes high = _mm256_and_si256(_mm256_srli_epi16(nines, 4), low);
        const Bytes set = _mm256_add_epi8(_mm256_add_epi8(_mm256_and_si256(nines, low), high), _mm256_slli_epi16(high, 3));
        store(places, _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(set)), 6));
        store(places + 4, _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(set, 1)), 6));
    }
}
}  // namespace simd

#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define SIMD_NAME "neon-dotprod"

namespace simd {
constexpr int W = 16;
using Bytes = uint8x16_t;
using Sums = int32x4_t;
using Partial = Sums;
constexpr int RUN = 1 << 20, NIBBLE_RUN = 1 << 20;
inline Bytes load(const void* p) { return vld1q_u8((const uint8_t*)p); }
inline Bytes four(const void* p) { int32_t v; std::memcpy(&v, p, 4); return vreinterpretq_u8_s32(vdupq_n_s32(v)); }
inline void store(int32_t* p, Sums a) { vst1q_s32(p, a); }
inline void store(uint8_t* p, Bytes a) { vst1q_u8(p, a); }
inline Sums zero() { return vdupq_n_s32(0); }
inline Sums add(Sums a, Sums b) { return vaddq_s32(a, b); }
inline Sums widen(Partial a) { return a; }
inline void spread(Bytes w, Bytes (&codes)[4]) {  // both sides of the product are signed: 2 << 6 would not fit
    for (int k = 0; k < 3; k++) codes[k] = vandq_u8(w, vdupq_n_u8(3 << 2 * k));
    codes[3] = vshrq_n_u8(w, 6);
}
inline Sums gather(const Partial (&a)[4]) {
    return add(add(a[0], vshrq_n_s32(a[1], 2)), add(vshrq_n_s32(a[2], 4), a[3]));
}
template <int K> inline Bytes pair(Bytes w) {
    if constexpr (K == 0) return vandq_u8(w, vdupq_n_u8(3));
    else if constexpr (K == 3) return vshrq_n_u8(w, 6);
    else return vandq_u8(vshrq_n_u8(w, 2 * K), vdupq_n_u8(3));
}
inline Bytes low_nibbles(Bytes w) { return vandq_u8(w, vdupq_n_u8(15)); }
inline Bytes high_nibbles(Bytes w) { return vshrq_n_u8(w, 4); }
inline Partial dot(Partial acc, Bytes u, Bytes s) { return vdotq_s32(acc, vreinterpretq_s8_u8(u), vreinterpretq_s8_u8(s)); }
inline Sums dot_two(Sums acc, Bytes u, Bytes s, Bytes v, Bytes t) { return dot(dot(acc, u, s), v, t); }
}  // namespace simd

#else
#define SIMD_NAME "plain"

namespace simd {
constexpr int W = 16;
struct Bytes { uint8_t b[16]; };
struct Sums { int32_t s[4]; };
using Partial = Sums;
constexpr int RUN = 1 << 20, NIBBLE_RUN = 1 << 20;
inline Bytes load(const void* p) { Bytes v; std::memcpy(&v, p, 16); return v; }
inline Bytes four(const void* p) { Bytes v; for (int i = 0; i < 4; i++) std::memcpy(v.b + 4 * i, p, 4); return v; }
inline void store(int32_t* p, Sums a) { std::memcpy(p, a.s, 16); }
inline void store(uint8_t* p, Bytes a) { std::memcpy(p, a.b, 16); }
inline Sums zero() { return Sums{}; }
inline Sums add(Sums a, Sums b) { for (int i = 0; i < 4; i++) a.s[i] += b.s[i]; return a; }
inline Sums widen(Partial a) { return a; }
template <int K> inline Bytes pair(Bytes w) { for (auto& b : w.b) b = b >> 2 * K & 3; return w; }
inline void spread(Bytes w, Bytes (&codes)[4]) {
    codes[0] = pair<0>(w), codes[1] = pair<1>(w), codes[2] = pair<2>(w), codes[3] = pair<3>(w);
}
inline Sums gather(const Partial (&a)[4]) { return add(add(a[0], a[1]), add(a[2], a[3])); }
inline Bytes low_nibbles(Bytes w) { for (auto& b : w.b) b &= 15; return w; }
inline Bytes high_nibbles(Bytes w) { for (auto& b : w.b) b >>= 4; return w; }
inline Partial dot(Partial acc, Bytes u, Bytes s) {
    for (int i = 0; i < 16; i++) acc.s[i / 4] += int(u.b[i]) * int(int8_t(s.b[i]));
    return acc;
}
inline Sums dot_two(Sums acc, Bytes u, Bytes s, Bytes v, Bytes t) { return dot(dot(acc, u, s), v, t); }
}  // namespace simd
#endif
