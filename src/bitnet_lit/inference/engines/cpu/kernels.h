// Integer products of packed weights (packing.h) and int8 activations.
//
// What is computed is sum((code + 1) * x); sum(x) is taken off at the end. All of it is exact in 32 bits for I < 2**22.
#pragma once

#include <algorithm>
#include <cstddef>

#include "packing.h"
#include "simd.h"

constexpr int PARTS = 64 / simd::W;                    // vectors in a block
constexpr int TILE = simd::W == 64 ? 16 : simd::W == 32 ? 5 : 6;  // tokens whose sums fit into the registers

// How far ahead weights are asked for, into the second cache: the hardware's own prefetching stops at every 4 KiB page, and
// a step reads each weight once. Half as fast again from memory (Sapphire Rapids); beyond the end of a matrix it is a no-op.
constexpr int AHEAD = 4096;
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// One group of rows times one token: the decode step. x is padded with zeros to whole blocks.
inline void group_dot(const uint8_t* w, const int8_t* x, int blocks, int32_t* out) {
    using namespace simd;
    Sums acc[2][PARTS][4];  // even and odd blocks: independent chains of additions
    for (auto& half : acc)
        for (auto& part : half)
            for (auto& a : part) a = zero();
    const auto one = [&](Sums (&sums)[PARTS][4], const uint8_t* block, const int8_t* in) {
        prefetch(block + AHEAD);
        for (int p = 0; p < PARTS; p++) {
            const Bytes v = load(block + p * W);
            sums[p][0] = dot_unsigned(sums[p][0], scaled_pair<0>(v), four(in));
            sums[p][1] = dot_unsigned(sums[p][1], scaled_pair<1>(v), four(in + 4));
            sums[p][2] = dot_unsigned(sums[p][2], scaled_pair<2>(v), four(in + 8));
            sums[p][3] = dot_unsigned(sums[p][3], scaled_pair<3>(v), four(in + 12));
        }
    };
    int block = 0;
    for (; block + 2 <= blocks; block += 2, w += 128, x += 2 * BLOCK) one(acc[0], w, x), one(acc[1], w + 64, x + BLOCK);
    if (block < blocks) one(acc[0], w, x);
    for (int p = 0; p < PARTS; p++) {
        const auto both = [&](int k) { return add(acc[0][p][k], acc[1][p][k]); };
        const Sums low = add(both(0), unscale<1>(both(1))), high = add(unscale<2>(both(2)), unscale<3>(both(3)));
        store(out + p * W / 4, add(low, high));
    }
}

// One group of rows times T tokens (x of stride bytes a token): unpacked once, used T times. out[token * ROWS + row].
template <int T>
inline void tile_dot(const uint8_t* w, const int8_t* x, size_t stride, int blocks, int32_t* out) {
    using namespace simd;
    Sums acc[PARTS][T];
    for (auto& part : acc)
        for (auto& a : part) a = zero();
    for (int block = 0; block < blocks; block++, w += 64, x += BLOCK) {
        Bytes v[PARTS];
        for (int p = 0; p < PARTS; p++) v[p] = load(w + p * W);
        const auto quarter = [&]<int K>() {
            Bytes codes[PARTS];
            for (int p = 0; p < PARTS; p++) codes[p] = pair<K>(v[p]);
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) {
                const Bytes in = four(x + t * stride + 4 * K);
                for (int p = 0; p < PARTS; p++) acc[p][t] = dot_unsigned(acc[p][t], codes[p], in);
            }
        };
        quarter.template operator()<0>();
        quarter.template operator()<1>();
        quarter.template operator()<2>();
        quarter.template operator()<3>();
    }
    for (int t = 0; t < T; t++)
        for (int p = 0; p < PARTS; p++) store(out + t * ROWS + p * W / 4, acc[p][t]);
}

template <int T>
inline void up_to(int tokens, const uint8_t* w, const int8_t* x, size_t stride, int blocks, int32_t* out) {
    if (tokens == T) tile_dot<T>(w, x, stride, blocks, out);
    else if constexpr (T > 1) up_to<T - 1>(tokens, w, x, stride, blocks, out);
}

// One group of rows times `tokens` tokens; out[token * ROWS + row].
inline void group_dots(const uint8_t* w, const int8_t* x, size_t stride, int tokens, int blocks, int32_t* out) {
    if (tokens == 1) return group_dot(w, x, blocks, out);
    for (int t = 0; t < tokens; t += TILE)
        up_to<TILE>(std::min(TILE, tokens - t), w, x + t * stride, stride, blocks, out + t * ROWS);
}

// An int8 row times 16-bit activations, given as their high and low bytes: x = 256 * high + low. `inputs` is padded to W.
inline double head_dot(const int8_t* w, const int8_t* high, const int8_t* low, int inputs, int64_t sum) {
    using namespace simd;
    Sums h0 = zero(), l0 = zero(), h1 = zero(), l1 = zero();
    int i = 0;
    for (; i + 2 * W <= inputs; i += 2 * W) {
        prefetch(w + i + AHEAD), prefetch(w + i + W + AHEAD);
        const Bytes a = load(w + i), b = load(w + i + W);
        h0 = dot_signed(h0, a, load(high + i));
        l0 = dot_signed(l0, a, load(low + i));
        h1 = dot_signed(h1, b, load(high + i + W));
        l1 = dot_signed(l1, b, load(low + i + W));
    }
    for (; i < inputs; i += W) {
        const Bytes a = load(w + i);
        h0 = dot_signed(h0, a, load(high + i));
        l0 = dot_signed(l0, a, load(low + i));
    }
    return 256.0 * total(add(h0, h1)) + total(add(l0, l1)) - double(SIGNED_OFFSET) * double(sum);
}
