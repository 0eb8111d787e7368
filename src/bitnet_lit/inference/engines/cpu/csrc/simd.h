// Vectors of bytes: the few operations that the integer kernels need, for x86 (AVX-512 VNNI, AVX2) and ARM (NEON dot
// product), and as plain loops for everything else. A vector holds W bytes; products of bytes are summed in fours into
// 32-bit lanes (Sums), where the instruction set has it directly, or by way of 16-bit sums (Partial) that are added up
// before they overflow.
//
//     four(p)          the same four bytes in every lane
//     dot(acc, u, s)   acc + unsigned u times signed s, for u of at most 15
//     low_nibbles, high_nibbles: the halves of each byte; NIBBLE_RUN of their products fit into a Partial
//     dot_two(...)     acc + u * s + v * t into Sums, for u and v of 0..63 and any s and t but -128
//
// for pairs.h:
//     spread(w, c)     the bit pairs of each byte as four vectors of codes, c[k] being pair k times a power of two
//     gather(acc)      the sum of four Sums made with dot of spread's codes, without those powers
//     pair<K>(w)       bit pair K of each byte
//
// AVX2, whose products of bytes need a second instruction to be added, has instead what triples.h and lookup.h need
// (SIMD_LOOKUP).
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
constexpr int NIBBLE_RUN = 1 << 20;
inline Bytes load(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes four(const void* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}
inline void store(void* p, Bytes a) { _mm512_storeu_si512(p, a); }  // or Sums
inline Sums zero() { return _mm512_setzero_si512(); }
inline Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline Sums widen(Partial a) { return a; }
inline void spread(Bytes w, Bytes (&codes)[4]) {
    for (int k = 0; k < 4; k++) codes[k] = _mm512_and_si512(w, _mm512_set1_epi8(char(3 << 2 * k)));
}
inline Sums gather(const Sums (&a)[4]) {
    return add(add(a[0], _mm512_srai_epi32(a[1], 2)), add(_mm512_srai_epi32(a[2], 4), _mm512_srai_epi32(a[3], 6)));
}
template <int K>
inline Bytes pair(Bytes w) {
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
using Partial = __m256i;       // 16-bit
constexpr int NIBBLE_RUN = 8;  // 8 * 2 * 15 * 127 is 30480
inline Bytes load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Bytes four(const void* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}
inline void store(void* p, Bytes a) { _mm256_storeu_si256((__m256i*)p, a); }  // or Sums
inline Sums zero() { return _mm256_setzero_si256(); }
inline Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
inline Sums widen(Partial a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
inline Bytes low_nibbles(Bytes w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes w) { return low_nibbles(_mm256_srli_epi16(w, 4)); }
inline void keep(Bytes& a) {
    asm("" : "+x"(a));
}  // GCC would make trees of long sums, for which the registers do not suffice
inline Partial dot(Partial acc, Bytes u, Bytes s) {
    acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, s));
    keep(acc);
    return acc;
}
inline Sums dot_two(Sums acc, Bytes u, Bytes s, Bytes v, Bytes t) {  // 2 * 2 * 63 * 127 is 32004
    return add(acc, widen(_mm256_add_epi16(_mm256_maddubs_epi16(u, s), _mm256_maddubs_epi16(v, t))));
}

#define SIMD_LOOKUP
inline Bytes all_bytes(int value) { return _mm256_set1_epi8(char(value)); }
inline Bytes add_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
inline Bytes any_of(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline Bytes signed_by(Bytes a, Bytes s) {
    return _mm256_sign_epi8(a, s);
}  // -a where s is negative, a where it is positive
inline Bytes sixteen(const int8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
inline Bytes choose(Bytes sixteen, Bytes numbers) { return _mm256_shuffle_epi8(sixteen, numbers); }  // each of 0..15

using Words = __m256i;  // sixteen 16-bit numbers
inline Words all_words(int value) { return _mm256_set1_epi16(int16_t(value)); }
inline Words words_signed_by(Words a, Words s) { return _mm256_sign_epi16(a, s); }  // 0 where s is 0
inline Words low_product(Words a, Words b) { return _mm256_mullo_epi16(a, b); }
inline Words rounded_product(Words a, Words b) { return _mm256_mulhrs_epi16(a, b); }  // a * b / 32768 to the nearest
inline Bytes bytes_of(Words a, Words b) { return _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8); }
inline Words high_bytes(Words a) { return _mm256_srai_epi16(a, 8); }
inline Words add_words(Words a, Words b) { return _mm256_add_epi16(a, b); }
inline Words sub_words(Words a, Words b) { return _mm256_sub_epi16(a, b); }
inline Words abs_words(Words a) { return _mm256_abs_epi16(a); }
// The even or the odd signed bytes, times 64.
inline Words even_times_64(Bytes a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 2); }
inline Words odd_times_64(Bytes a) { return _mm256_and_si256(_mm256_srai_epi16(a, 2), _mm256_set1_epi16(-64)); }
inline Words times_256(Words a) { return _mm256_slli_epi16(a, 8); }
// To the sums factor * a + b; of each 128 bits the first four numbers to `low`, the others to `high`.
inline void add_weighted(Words a, Words b, int factor, Sums& low, Sums& high) {
    const Words factors = _mm256_set1_epi32(1 << 16 | factor);
    low = add(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), factors));
    high = add(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), factors));
}
// Of sixteen rows four numbers each to 64 bits, or two to 32; and what add_weighted made. All in the order of the rows,
// when those are in words 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14 and 15 (unpacking keeps to the halves of a
// vector).
inline void store_fours(uint64_t* to, const Words* a) {
    const Words low[2] = {_mm256_unpacklo_epi16(a[0], a[1]), _mm256_unpacklo_epi16(a[2], a[3])};
    const Words high[2] = {_mm256_unpackhi_epi16(a[0], a[1]), _mm256_unpackhi_epi16(a[2], a[3])};
    store(to, _mm256_unpacklo_epi32(low[0], low[1])), store(to + 4, _mm256_unpackhi_epi32(low[0], low[1]));
    store(to + 8, _mm256_unpacklo_epi32(high[0], high[1])), store(to + 12, _mm256_unpackhi_epi32(high[0], high[1]));
}
inline void store_sums(void* to, Sums low, Sums high) {
    store(to, _mm256_permute4x64_epi64(low, 0xd8)), store((int32_t*)to + 8, _mm256_permute4x64_epi64(high, 0xd8));
}
inline void store_twos(uint32_t* to, const Words* a) {
    store_sums(to, _mm256_unpacklo_epi16(a[0], a[1]), _mm256_unpackhi_epi16(a[0], a[1]));
}
inline bool any_negative(Words a) { return _mm256_movemask_epi8(a) & 0xaaaaaaaa; }
// Eight numbers of each row to eight columns, by perfect shuffles of the order of eight vectors' elements: three of
// them turn the bits of an element's place by three. Of bytes sixteen rows, of 16-bit numbers eight; the columns are
// twice as wide.
inline void columns_of(const int8_t* rows, size_t stride, Words (&columns)[8]) {
    __m128i a[8], b[8];
    const auto row = [&](int i) { return _mm_loadl_epi64((const __m128i*)(rows + i * stride)); };
    for (int i = 0; i < 8; i++) a[i] = _mm_unpacklo_epi8(row(i), row(i + 8));
    const auto shuffle = [](const __m128i(&from)[8], __m128i(&to)[8]) {
        for (int i = 0; i < 4; i++)
            to[2 * i] = _mm_unpacklo_epi8(from[i], from[i + 4]),
                   to[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + 4]);
    };
    shuffle(a, b), shuffle(b, a), shuffle(a, b);
    for (int i = 0; i < 8; i++) columns[i] = _mm256_cvtepi8_epi16(b[i]);
}
inline void columns_of(const int16_t* rows, size_t stride, Sums (&columns)[8]) {
    __m128i a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = _mm_loadu_si128((const __m128i*)(rows + i * stride));
    const auto shuffle = [](const __m128i(&from)[8], __m128i(&to)[8]) {
        for (int i = 0; i < 4; i++)
            to[2 * i] = _mm_unpacklo_epi16(from[i], from[i + 4]),
                   to[2 * i + 1] = _mm_unpackhi_epi16(from[i], from[i + 4]);
    };
    shuffle(a, b), shuffle(b, a), shuffle(a, b);
    for (int i = 0; i < 8; i++) columns[i] = _mm256_cvtepi16_epi32(b[i]);
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
constexpr int NIBBLE_RUN = 1 << 20;
inline Bytes load(const void* p) { return vld1q_u8((const uint8_t*)p); }
inline Bytes four(const void* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return vreinterpretq_u8_s32(vdupq_n_s32(v));
}
inline void store(int32_t* p, Sums a) { vst1q_s32(p, a); }
inline void store(uint8_t* p, Bytes a) { vst1q_u8(p, a); }
inline Sums zero() { return vdupq_n_s32(0); }
inline Sums add(Sums a, Sums b) { return vaddq_s32(a, b); }
inline Sums widen(Partial a) { return a; }
inline void spread(Bytes w, Bytes (&codes)[4]) {  // both sides of the product are signed: 2 << 6 would not fit
    for (int k = 0; k < 3; k++) codes[k] = vandq_u8(w, vdupq_n_u8(3 << 2 * k));
    codes[3] = vshrq_n_u8(w, 6);
}
inline Sums gather(const Sums (&a)[4]) { return add(add(a[0], vshrq_n_s32(a[1], 2)), add(vshrq_n_s32(a[2], 4), a[3])); }
template <int K>
inline Bytes pair(Bytes w) {
    if constexpr (K == 0) return vandq_u8(w, vdupq_n_u8(3));
    else if constexpr (K == 3) return vshrq_n_u8(w, 6);
    else return vandq_u8(vshrq_n_u8(w, 2 * K), vdupq_n_u8(3));
}
inline Bytes low_nibbles(Bytes w) { return vandq_u8(w, vdupq_n_u8(15)); }
inline Bytes high_nibbles(Bytes w) { return vshrq_n_u8(w, 4); }
inline Partial dot(Partial acc, Bytes u, Bytes s) {
    return vdotq_s32(acc, vreinterpretq_s8_u8(u), vreinterpretq_s8_u8(s));
}
inline Sums dot_two(Sums acc, Bytes u, Bytes s, Bytes v, Bytes t) { return dot(dot(acc, u, s), v, t); }
}  // namespace simd

#else
#define SIMD_NAME "plain"

namespace simd {
constexpr int W = 16;
struct Bytes {
    uint8_t b[16];
};
struct Sums {
    int32_t s[4];
};
using Partial = Sums;
constexpr int NIBBLE_RUN = 1 << 20;
inline Bytes load(const void* p) {
    Bytes v;
    std::memcpy(&v, p, 16);
    return v;
}
inline Bytes four(const void* p) {
    Bytes v;
    for (int i = 0; i < 4; i++) std::memcpy(v.b + 4 * i, p, 4);
    return v;
}
inline void store(int32_t* p, Sums a) { std::memcpy(p, a.s, 16); }
inline void store(uint8_t* p, Bytes a) { std::memcpy(p, a.b, 16); }
inline Sums zero() { return Sums{}; }
inline Sums add(Sums a, Sums b) {
    for (int i = 0; i < 4; i++) a.s[i] += b.s[i];
    return a;
}
inline Sums widen(Partial a) { return a; }
template <int K>
inline Bytes pair(Bytes w) {
    for (auto& b : w.b) b = b >> 2 * K & 3;
    return w;
}
inline void spread(Bytes w, Bytes (&codes)[4]) {
    codes[0] = pair<0>(w), codes[1] = pair<1>(w), codes[2] = pair<2>(w), codes[3] = pair<3>(w);
}
inline Sums gather(const Sums (&a)[4]) { return add(add(a[0], a[1]), add(a[2], a[3])); }
inline Bytes low_nibbles(Bytes w) {
    for (auto& b : w.b) b &= 15;
    return w;
}
inline Bytes high_nibbles(Bytes w) {
    for (auto& b : w.b) b >>= 4;
    return w;
}
inline Partial dot(Partial acc, Bytes u, Bytes s) {
    for (int i = 0; i < 16; i++) acc.s[i / 4] += int(u.b[i]) * int(int8_t(s.b[i]));
    return acc;
}
inline Sums dot_two(Sums acc, Bytes u, Bytes s, Bytes v, Bytes t) { return dot(dot(acc, u, s), v, t); }
}  // namespace simd
#endif

constexpr int PARTS = 64 / simd::W;  // vectors in 64 bytes
