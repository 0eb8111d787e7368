// Integer products of packed weights (packing.h) and int8 activations.
//
// What is computed is sum((code + 1) * x); sum(x) is taken off at the end. All of it is exact in 32 bits for I < 2**18.
#pragma once

#include <algorithm>
#include <cstddef>

#include "packing.h"
#include "simd.h"

constexpr int PARTS = 64 / simd::W;  // vectors in a block

// How far ahead weights are asked for, into the second cache: the hardware's own prefetching stops at every 4 KiB page, and
// a step reads each weight once. Half as fast again from memory (Sapphire Rapids); beyond the end of a matrix it is a no-op.
constexpr int AHEAD = 4096;
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Independent chains of additions for each code and token: AVX-512 adds into 32 bits at once, which takes some cycles.
template <int T> constexpr int CHAINS = simd::W == 64 && T <= 2 ? 2 : 1;

// One group of rows times T tokens (x of stride bytes a token, padded with zeros to whole pairs of blocks), each code with
// sums of its own: the decode step. out[token * ROWS + row].
template <int T>
ONCE void few_dot(const uint8_t* w, const int8_t* x, size_t stride, int blocks, int32_t* out) {
    using namespace simd;
    Sums sums[T][PARTS];
    for (auto& token : sums)
        for (auto& sum : token) sum = zero();
    for (int block = 0; block < blocks;) {
        Partial acc[CHAINS<T>][T][PARTS][4];
        for (auto& chain : acc)
            for (auto& token : chain)
                for (auto& part : token)
                    for (auto& a : part) a = zero();
        const int end = std::min(blocks, block + RUN);
        for (; block < end; block += CHAINS<T>)
            for (int c = 0; c < CHAINS<T>; c++, w += 64, x += BLOCK) {
                prefetch(w + AHEAD);
                for (int p = 0; p < PARTS; p++) {
                    Bytes codes[4];
                    spread(load(w + p * W), codes);
                    for (int t = 0; t < T; t++)
                        for (int k = 0; k < 4; k++)
                            acc[c][t][p][k] = dot(acc[c][t][p][k], codes[k], four(x + t * stride + 4 * k));
                }
            }
        for (auto& chain : acc)
            for (int t = 0; t < T; t++)
                for (int p = 0; p < PARTS; p++) sums[t][p] = add(sums[t][p], gather(chain[t][p]));
    }
    for (int t = 0; t < T; t++)
        for (int p = 0; p < PARTS; p++) store(out + t * ROWS + p * W / 4, sums[t][p]);
}

// The same with one sum for all codes: more tokens than few_dot has registers for.
template <int T>
ONCE void tile_dot(const uint8_t* w, const int8_t* x, size_t stride, int blocks, int32_t* out) {
    using namespace simd;
    std::memset(out, 0, size_t(T) * ROWS * sizeof(int32_t));
    for (int block = 0; block < blocks;) {
        Partial acc[T][PARTS];
        for (auto& token : acc)
            for (auto& a : token) a = zero();
        const int end = std::min(blocks, block + RUN);
        for (; block < end; block++, w += 64, x += BLOCK) {
            const auto quarter = [&]<int K>() {
                Bytes codes[PARTS];
                for (int p = 0; p < PARTS; p++) codes[p] = pair<K>(load(w + p * W));
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) {
                    const Bytes in = four(x + t * stride + 4 * K);
                    for (int p = 0; p < PARTS; p++) acc[t][p] = dot(acc[t][p], codes[p], in);
                }
            };
            quarter.template operator()<0>();
            quarter.template operator()<1>();
            quarter.template operator()<2>();
            quarter.template operator()<3>();
        }
        for (int t = 0; t < T; t++)
            for (int p = 0; p < PARTS; p++) {
                int32_t* place = out + t * ROWS + p * W / 4;
                Sums before;
                std::memcpy(&before, place, sizeof(before));
                store(place, add(before, widen(acc[t][p])));
            }
    }
}

// Tokens whose sums fit into the registers.
constexpr int FEW = simd::W == 64 ? 4 : 1;
constexpr int TILE = simd::W == 64 ? 16 : simd::W == 32 ? 5 : 6;

template <int T>
inline void up_to(int tokens, const uint8_t* w, const int8_t* x, size_t stride, int blocks, int32_t* out) {
    if (tokens != T) {
        if constexpr (T > 1) up_to<T - 1>(tokens, w, x, stride, blocks, out);
    } else if constexpr (T <= FEW) {
        few_dot<T>(w, x, stride, blocks, out);
    } else {
        tile_dot<T>(w, x, stride, blocks, out);
    }
}

// One group of rows times `tokens` tokens; out[token * ROWS + row].
inline void group_dots(const uint8_t* w, const int8_t* x, size_t stride, int tokens, int blocks, int32_t* out) {
    for (int t = 0; t < tokens; t += TILE)
        up_to<TILE>(std::min(TILE, tokens - t), w, x + t * stride, stride, blocks, out + t * ROWS);
}
