// Integer vectors for x86 processors with AVX-512 VNNI (Intel since Ice Lake, AMD since Zen 4). simd.h says what each
// function computes. `dpbusd` multiplies four unsigned bytes with four signed ones and adds the products to an int32
// lane.
#pragma once

#include <cstdint>
#include <cstring>

#include <immintrin.h>

#define SIMD_NAME "avx512-vnni"

namespace simd {

constexpr int WIDTH = 64;
using ByteVec = __m512i;
using Int32Vec = __m512i;
using PartialSum = Int32Vec;
constexpr int MAX_PARTIAL_TERMS = 1 << 20;
inline ByteVec load(const void* p) { return _mm512_loadu_si512(p); }
inline ByteVec broadcast_4(const void* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}
inline void store(void* p, ByteVec a) { _mm512_storeu_si512(p, a); }  // or Int32Vec
inline Int32Vec zero() { return _mm512_setzero_si512(); }
inline Int32Vec add(Int32Vec a, Int32Vec b) { return _mm512_add_epi32(a, b); }
inline Int32Vec widen(PartialSum a) { return a; }
inline void isolate_bit_pairs(ByteVec w, ByteVec (&codes)[4]) {
    for (int k = 0; k < 4; k++) codes[k] = _mm512_and_si512(w, _mm512_set1_epi8(char(3 << 2 * k)));
}
inline Int32Vec combine_bit_pairs(const Int32Vec (&a)[4]) {
    return add(add(a[0], _mm512_srai_epi32(a[1], 2)), add(_mm512_srai_epi32(a[2], 4), _mm512_srai_epi32(a[3], 6)));
}
template <int K>
inline ByteVec bit_pair(ByteVec w) {
    return _mm512_and_si512(_mm512_srli_epi16(w, 2 * K), _mm512_set1_epi8(3));
}
inline ByteVec low_nibbles(ByteVec w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline ByteVec high_nibbles(ByteVec w) { return low_nibbles(_mm512_srli_epi16(w, 4)); }
inline PartialSum dot(PartialSum acc, ByteVec u, ByteVec s) { return _mm512_dpbusd_epi32(acc, u, s); }
inline Int32Vec dot_two(Int32Vec acc, ByteVec u, ByteVec s, ByteVec v, ByteVec t) { return dot(dot(acc, u, s), v, t); }

}  // namespace simd
