// Integer vectors as plain loops, for every other processor. simd.h says what each function computes; this file is the
// shortest definition of it.
#pragma once

#include <cstdint>
#include <cstring>

#define SIMD_NAME "plain"

namespace simd {

constexpr int WIDTH = 16;
struct ByteVec {
    uint8_t b[16];
};
struct Int32Vec {
    int32_t s[4];
};
using PartialSum = Int32Vec;
constexpr int MAX_PARTIAL_TERMS = 1 << 20;
inline ByteVec load(const void* p) {
    ByteVec v;
    std::memcpy(&v, p, 16);
    return v;
}
inline ByteVec broadcast_4(const void* p) {
    ByteVec v;
    for (int i = 0; i < 4; i++) std::memcpy(v.b + 4 * i, p, 4);
    return v;
}
inline void store(int32_t* p, Int32Vec a) { std::memcpy(p, a.s, 16); }
inline void store(uint8_t* p, ByteVec a) { std::memcpy(p, a.b, 16); }
inline Int32Vec zero() { return Int32Vec{}; }
inline Int32Vec add(Int32Vec a, Int32Vec b) {
    for (int i = 0; i < 4; i++) a.s[i] += b.s[i];
    return a;
}
inline Int32Vec widen(PartialSum a) { return a; }
template <int K>
inline ByteVec bit_pair(ByteVec w) {
    for (auto& b : w.b) b = b >> 2 * K & 3;
    return w;
}
inline void isolate_bit_pairs(ByteVec w, ByteVec (&codes)[4]) {
    codes[0] = bit_pair<0>(w), codes[1] = bit_pair<1>(w), codes[2] = bit_pair<2>(w), codes[3] = bit_pair<3>(w);
}
inline Int32Vec combine_bit_pairs(const Int32Vec (&a)[4]) { return add(add(a[0], a[1]), add(a[2], a[3])); }
inline ByteVec low_nibbles(ByteVec w) {
    for (auto& b : w.b) b &= 15;
    return w;
}
inline ByteVec high_nibbles(ByteVec w) {
    for (auto& b : w.b) b >>= 4;
    return w;
}
inline PartialSum dot(PartialSum acc, ByteVec u, ByteVec s) {
    for (int i = 0; i < 16; i++) acc.s[i / 4] += int(u.b[i]) * int(int8_t(s.b[i]));
    return acc;
}
inline Int32Vec dot_two(Int32Vec acc, ByteVec u, ByteVec s, ByteVec v, ByteVec t) { return dot(dot(acc, u, s), v, t); }

}  // namespace simd
