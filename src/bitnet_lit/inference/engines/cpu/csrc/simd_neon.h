// Integer vectors for ARM processors with the dot product extension (Apple silicon, Neoverse N1 and later). simd.h says
// what each function computes. `sdot` multiplies four signed bytes with four signed ones and adds the products to an
// int32 lane.
#pragma once

#include <cstdint>
#include <cstring>

#include <arm_neon.h>

#define SIMD_NAME "neon-dotprod"

namespace simd {

constexpr int WIDTH = 16;
using ByteVec = uint8x16_t;
using Int32Vec = int32x4_t;
using PartialSum = Int32Vec;
constexpr int MAX_PARTIAL_TERMS = 1 << 20;
inline ByteVec load(const void* p) { return vld1q_u8((const uint8_t*)p); }
inline ByteVec broadcast_4(const void* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return vreinterpretq_u8_s32(vdupq_n_s32(v));
}
inline void store(int32_t* p, Int32Vec a) { vst1q_s32(p, a); }
inline void store(uint8_t* p, ByteVec a) { vst1q_u8(p, a); }
inline Int32Vec zero() { return vdupq_n_s32(0); }
inline Int32Vec add(Int32Vec a, Int32Vec b) { return vaddq_s32(a, b); }
inline Int32Vec widen(PartialSum a) { return a; }
// Both operands of sdot are signed, and 2 << 6 does not fit a signed byte: the last pair is shifted down.
inline void isolate_bit_pairs(ByteVec w, ByteVec (&codes)[4]) {
    for (int k = 0; k < 3; k++) codes[k] = vandq_u8(w, vdupq_n_u8(3 << 2 * k));
    codes[3] = vshrq_n_u8(w, 6);
}
inline Int32Vec combine_bit_pairs(const Int32Vec (&a)[4]) {
    return add(add(a[0], vshrq_n_s32(a[1], 2)), add(vshrq_n_s32(a[2], 4), a[3]));
}
template <int K>
inline ByteVec bit_pair(ByteVec w) {
    if constexpr (K == 0) return vandq_u8(w, vdupq_n_u8(3));
    else if constexpr (K == 3) return vshrq_n_u8(w, 6);
    else return vandq_u8(vshrq_n_u8(w, 2 * K), vdupq_n_u8(3));
}
inline ByteVec low_nibbles(ByteVec w) { return vandq_u8(w, vdupq_n_u8(15)); }
inline ByteVec high_nibbles(ByteVec w) { return vshrq_n_u8(w, 4); }
inline PartialSum dot(PartialSum acc, ByteVec u, ByteVec s) {
    return vdotq_s32(acc, vreinterpretq_s8_u8(u), vreinterpretq_s8_u8(s));
}
inline Int32Vec dot_two(Int32Vec acc, ByteVec u, ByteVec s, ByteVec v, ByteVec t) { return dot(dot(acc, u, s), v, t); }

}  // namespace simd
