// Vectors of bytes and of int32 accumulators: the operations that the integer kernels are written in.
//
//     file            processors              vector      product of bytes
//     simd_avx512.h   x86 with AVX-512 VNNI   64 bytes    dpbusd: four products into an int32 lane
//     simd_avx2.h     x86 with AVX2           32 bytes    maddubs: two products into an int16 lane
//     simd_neon.h     ARM with dot product    16 bytes    sdot: four products into an int32 lane
//     simd_scalar.h   any other               16 bytes    loops
//
// A ByteVec holds WIDTH bytes and an Int32Vec WIDTH / 4 accumulators. Each file defines:
//
//     broadcast_4(p)    the four bytes at p in every int32 lane
//     dot(acc, u, s)    acc + u * s for unsigned u of at most 15 and signed s. The accumulator is a PartialSum: int32,
//     or
//                       int16 with AVX2, where it holds MAX_PARTIAL_TERMS products of each byte before it may overflow
//     widen(acc)        a PartialSum as int32
//     dot_two(acc, u, s, v, t)      int32: acc + u * s + v * t for u and v of 0..63 and s and t of -127..127
//     low_nibbles(w), high_nibbles(w)  the lower or the upper four bits of each byte
//
// and, for packed_2bit.h, all but AVX2:
//
//     bit_pair<K>(w)           bits 2 K and 2 K + 1 of each byte, as a number of 0..3
//     isolate_bit_pairs(w, c)  the four bit pairs of each byte by masks alone: c[k] is pair k times a power of two
//     combine_bit_pairs(acc)   the sum of the four accumulators of such c[k], divided by those powers
#pragma once

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

constexpr int VECTORS_PER_LINE = 64 / simd::WIDTH;  // vectors in 64 bytes
