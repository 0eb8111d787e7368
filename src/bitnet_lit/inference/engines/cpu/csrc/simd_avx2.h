// Integer vectors for x86 processors with AVX2 (Intel since Haswell, AMD since Zen). simd.h says what the first
// functions compute.
//
// AVX2 has no product of bytes that accumulates into int32. `maddubs` adds two products into an int16 lane, and further
// instructions must widen the lanes before they overflow. That makes multiplications dear and lookups cheap: `pshufb`
// selects sixteen bytes from a table of sixteen in one instruction.
#pragma once

#include <cstdint>
#include <cstring>

#include <immintrin.h>

#define SIMD_NAME "avx2"

namespace simd {

constexpr int WIDTH = 32;
using ByteVec = __m256i;
using Int32Vec = __m256i;
using PartialSum = __m256i;           // int16
constexpr int MAX_PARTIAL_TERMS = 8;  // at most 8 * 2 * 15 * 127 = 30480
inline ByteVec load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline ByteVec broadcast_4(const void* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}
inline void store(void* p, ByteVec a) { _mm256_storeu_si256((__m256i*)p, a); }  // or Int32Vec
inline Int32Vec zero() { return _mm256_setzero_si256(); }
inline Int32Vec add(Int32Vec a, Int32Vec b) { return _mm256_add_epi32(a, b); }
inline Int32Vec widen(PartialSum a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
inline ByteVec low_nibbles(ByteVec w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
inline ByteVec high_nibbles(ByteVec w) { return low_nibbles(_mm256_srli_epi16(w, 4)); }
// An empty barrier: without it GCC reorders a long chain of additions into a tree, for which there are too few
// registers.
inline void keep_in_register(ByteVec& a) { asm("" : "+x"(a)); }
inline PartialSum dot(PartialSum acc, ByteVec u, ByteVec s) {
    acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, s));
    keep_in_register(acc);
    return acc;
}
inline Int32Vec dot_two(Int32Vec acc, ByteVec u, ByteVec s, ByteVec v, ByteVec t) {  // at most 2 * 2 * 63 * 127 = 32004
    return add(acc, widen(_mm256_add_epi16(_mm256_maddubs_epi16(u, s), _mm256_maddubs_epi16(v, t))));
}

// The rest is for packed_5bit.h and lookup_matmul.h, which other instruction sets do not need.
#define SIMD_LOOKUP

// Bytes: signed, except for the indices of shuffle_bytes.
inline ByteVec set1_int8(int value) { return _mm256_set1_epi8(char(value)); }
inline ByteVec add_int8(ByteVec a, ByteVec b) { return _mm256_add_epi8(a, b); }
inline ByteVec or_bytes(ByteVec a, ByteVec b) { return _mm256_or_si256(a, b); }
// a where s is positive, -a where it is negative, 0 where it is 0.
inline ByteVec sign_int8(ByteVec a, ByteVec s) { return _mm256_sign_epi8(a, s); }
inline ByteVec broadcast_16(const int8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
// table[index] for each byte; the table is one of broadcast_16, an index lies in 0..15.
inline ByteVec shuffle_bytes(ByteVec table, ByteVec index) { return _mm256_shuffle_epi8(table, index); }

using Int16Vec = __m256i;
inline Int16Vec set1_int16(int value) { return _mm256_set1_epi16(int16_t(value)); }
inline Int16Vec sign_int16(Int16Vec a, Int16Vec s) { return _mm256_sign_epi16(a, s); }
inline Int16Vec mul_low_int16(Int16Vec a, Int16Vec b) { return _mm256_mullo_epi16(a, b); }
// a * b / 32768, rounded to the nearest integer.
inline Int16Vec mul_round_int16(Int16Vec a, Int16Vec b) { return _mm256_mulhrs_epi16(a, b); }
// int8: sixteen numbers of a, then sixteen of b, all within -128..127.
inline ByteVec narrow_to_int8(Int16Vec a, Int16Vec b) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
}
// The upper byte of each int16 lane, sign-extended.
inline Int16Vec high_int8(Int16Vec a) { return _mm256_srai_epi16(a, 8); }
inline Int16Vec add_int16(Int16Vec a, Int16Vec b) { return _mm256_add_epi16(a, b); }
inline Int16Vec sub_int16(Int16Vec a, Int16Vec b) { return _mm256_sub_epi16(a, b); }
inline Int16Vec abs_int16(Int16Vec a) { return _mm256_abs_epi16(a); }
// The even or the odd int8 of a vector as int16, times 64.
inline Int16Vec even_times_64(ByteVec a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 2); }
inline Int16Vec odd_times_64(ByteVec a) { return _mm256_and_si256(_mm256_srai_epi16(a, 2), _mm256_set1_epi16(-64)); }
inline Int16Vec shift_left_8(Int16Vec a) { return _mm256_slli_epi16(a, 8); }
// Adds factor * a + b, int16, to int32 accumulators. Of each 128-bit half the first four numbers go to `low`, the last
// four to `high`, as unpacking leaves them.
inline void add_scaled(Int16Vec a, Int16Vec b, int factor, Int32Vec& low, Int32Vec& high) {
    const Int16Vec factors = _mm256_set1_epi32(1 << 16 | factor);
    low = add(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), factors));
    high = add(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), factors));
}
// The next three store the numbers of sixteen rows in the order of the rows, provided that rows 0, 1, 2, ... are in
// int16 lanes 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14 and 15: unpack instructions do not cross the 128-bit
// halves. Four vectors: each row's four int16 side by side.
inline void store_interleaved_4(uint64_t* to, const Int16Vec* a) {
    const Int16Vec low[2] = {_mm256_unpacklo_epi16(a[0], a[1]), _mm256_unpacklo_epi16(a[2], a[3])};
    const Int16Vec high[2] = {_mm256_unpackhi_epi16(a[0], a[1]), _mm256_unpackhi_epi16(a[2], a[3])};
    store(to, _mm256_unpacklo_epi32(low[0], low[1])), store(to + 4, _mm256_unpackhi_epi32(low[0], low[1]));
    store(to + 8, _mm256_unpacklo_epi32(high[0], high[1])), store(to + 12, _mm256_unpackhi_epi32(high[0], high[1]));
}
// What add_scaled accumulated: an int32 for each row.
inline void store_sums(void* to, Int32Vec low, Int32Vec high) {
    store(to, _mm256_permute4x64_epi64(low, 0xd8)), store((int32_t*)to + 8, _mm256_permute4x64_epi64(high, 0xd8));
}
// Two vectors: each row's two int16 side by side.
inline void store_interleaved_2(uint32_t* to, const Int16Vec* a) {
    store_sums(to, _mm256_unpacklo_epi16(a[0], a[1]), _mm256_unpackhi_epi16(a[0], a[1]));
}
inline bool any_negative(Int16Vec a) { return _mm256_movemask_epi8(a) & 0xaaaaaaaa; }
// Transposes eight columns of `rows`: columns[j] holds number j of each row, widened to twice its bits. It takes
// sixteen rows of int8 or eight rows of int16, `stride` numbers apart. A perfect shuffle of eight vectors rotates the
// bits of an element's index by one; three of them exchange its vector and its lane.
inline void transpose_8(const int8_t* rows, size_t stride, Int16Vec (&columns)[8]) {
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
inline void transpose_8(const int16_t* rows, size_t stride, Int32Vec (&columns)[8]) {
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
