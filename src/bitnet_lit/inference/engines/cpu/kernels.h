// Integer products. Weights are packed once, at load, in the layout that is read: see `pack_ternary`.
//
// A ternary matrix of O rows and I inputs: rows in groups of 4, inputs in blocks of 256. A block of one row is 64 bytes;
// byte j holds the inputs j, j + 64, j + 128, j + 192 in its bit pairs, lowest first, each as code + 1. The four rows of a
// group lie block by block beside each other, so that one thread reads one stream of memory. Rows and inputs that do not
// exist are code 0.
//
// What is computed is sum((code + 1) * x); sum(x) is taken off at the end. All of it is exact in 32 bits for I < 2**22.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "simd.h"

constexpr int BLOCK = 256, ROWS = 4, TILE = 12;

// How far ahead weights are asked for, into the second cache: the hardware's own prefetching stops at every 4 KiB page, and
// a step reads each weight once. Half as fast again from memory (Sapphire Rapids); beyond the end of a matrix it is a no-op.
constexpr int AHEAD = 4096;
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

inline int blocks_of(int inputs) { return (inputs + BLOCK - 1) / BLOCK; }
inline int groups_of(int rows) { return (rows + ROWS - 1) / ROWS; }
inline size_t group_bytes(int inputs) { return size_t(blocks_of(inputs)) * ROWS * 64; }

inline void pack_ternary(const int8_t* codes, int rows, int inputs, uint8_t* packed) {
    for (int group = 0; group < groups_of(rows); group++)
        for (int block = 0; block < blocks_of(inputs); block++)
            for (int r = 0; r < ROWS; r++)
                for (int j = 0; j < 64; j++) {
                    uint8_t byte = 0;
                    for (int k = 0; k < 4; k++) {
                        const int row = group * ROWS + r, input = block * BLOCK + k * 64 + j;
                        const int code = row < rows && input < inputs ? codes[size_t(row) * inputs + input] : 0;
                        byte |= uint8_t(code + 1) << 2 * k;
                    }
                    *packed++ = byte;
                }
}

// One group of rows times one token: the decode step. x is padded with zeros to whole blocks.
inline void group_dot(const uint8_t* w, const int8_t* x, int blocks, int32_t* out) {
    using namespace simd;
    Sums acc[ROWS][4];
    for (auto& row : acc)
        for (auto& a : row) a = zero();
    for (int block = 0; block < blocks; block++, w += ROWS * 64, x += BLOCK)
        for (int s = 0; s < 64; s += W) {
            const Bytes x0 = load(x + s), x1 = load(x + 64 + s), x2 = load(x + 128 + s), x3 = load(x + 192 + s);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                prefetch(w + r * 64 + s + AHEAD);
                const Bytes v = load(w + r * 64 + s);
                acc[r][0] = dot_unsigned(acc[r][0], scaled_pair<0>(v), x0);
                acc[r][1] = dot_unsigned(acc[r][1], scaled_pair<1>(v), x1);
                acc[r][2] = dot_unsigned(acc[r][2], scaled_pair<2>(v), x2);
                acc[r][3] = dot_unsigned(acc[r][3], scaled_pair<3>(v), x3);
            }
        }
    for (int r = 0; r < ROWS; r++)
        out[r] = total(add(add(acc[r][0], unscale<1>(acc[r][1])), add(unscale<2>(acc[r][2]), unscale<3>(acc[r][3]))));
}

// Two rows of a group times T tokens (x of stride bytes a token): unpacked once, used T times. out[token * ROWS + row].
template <int T>
inline void pair_dot(const uint8_t* w, const int8_t* x, size_t stride, int blocks, int32_t* out) {
    using namespace simd;
    Sums acc[2][T];
    for (auto& row : acc)
        for (auto& a : row) a = zero();
    for (int block = 0; block < blocks; block++, w += ROWS * 64, x += BLOCK)
        for (int s = 0; s < 64; s += W) {
            const Bytes a = load(w + s), b = load(w + 64 + s);
            const auto four = [&]<int K>() {
                const Bytes a_k = pair<K>(a), b_k = pair<K>(b);
#pragma GCC unroll 12
                for (int t = 0; t < T; t++) {
                    const Bytes x_t = load(x + t * stride + K * 64 + s);
                    acc[0][t] = dot_unsigned(acc[0][t], a_k, x_t);
                    acc[1][t] = dot_unsigned(acc[1][t], b_k, x_t);
                }
            };
            four.template operator()<0>();
            four.template operator()<1>();
            four.template operator()<2>();
            four.template operator()<3>();
        }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < 2; r++) out[t * ROWS + r] = total(acc[r][t]);
}

template <int T>
inline void tile_dot(int tokens, const uint8_t* w, const int8_t* x, size_t stride, int blocks, int32_t* out) {
    if (tokens == T) {
        pair_dot<T>(w, x, stride, blocks, out);
        pair_dot<T>(w + 2 * 64, x, stride, blocks, out + 2);
    } else if constexpr (T > 1) {
        tile_dot<T - 1>(tokens, w, x, stride, blocks, out);
    }
}

// One group of rows times `tokens` tokens; out[token * ROWS + row].
inline void group_dots(const uint8_t* w, const int8_t* x, size_t stride, int tokens, int blocks, int32_t* out) {
    if (tokens == 1) return group_dot(w, x, blocks, out);
    for (int t = 0; t < tokens; t += TILE)
        tile_dot<TILE>(std::min(TILE, tokens - t), w, x + t * stride, stride, blocks, out + t * ROWS);
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
