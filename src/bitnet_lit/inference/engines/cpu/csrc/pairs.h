// Weights of 2 bits and their products with int8 activations, for processors with a product of bytes that adds into 32
// bits.
//
// A matrix of O rows and I inputs: rows in groups of 16, inputs in blocks of 16. A block of a group is 64 bytes, four
// for each row; byte j of a row holds its inputs j, j + 4, j + 8, j + 12 in its bit pairs, lowest first, each as code
// + 1. So a 32-bit lane belongs to one row from beginning to end, and no sum has to be collected from several lanes.
// The blocks of a group follow each other: a thread reads one stream of memory.
//
// What is computed is sum((code + 1) * x); sum(x) is taken off at the end. All of it is exact in 32 bits for I < 2**18.
#pragma once

#include <algorithm>
#include <vector>

#include "floats.h"
#include "simd.h"

constexpr int BLOCK = 16, ROWS = 16, BLOCK_BYTES = 64;

inline int blocks_of(int inputs) { return round_up(inputs, 2 * BLOCK) / BLOCK; }  // even: kernels take two at once

// The codes + 1 of a row in a block, a byte each, to `block`.
inline void pack_block(const uint8_t* codes, int row, uint8_t* block) {
    uint32_t words[4];  // byte j of word k is input 4 * k + j
    std::memcpy(words, codes, sizeof(words));
    const uint32_t word = words[0] | words[1] << 2 | words[2] << 4 | words[3] << 6;
    std::memcpy(block + 4 * row, &word, sizeof(word));
}

// Independent chains of additions for each code and token: AVX-512 adds into 32 bits at once, which takes some cycles.
template <int T>
constexpr int CHAINS = simd::W == 64 && T <= 2 ? 2 : 1;

// One group of rows times T tokens (x of stride bytes a token, padded with zeros to whole pairs of blocks), each code
// with sums of its own: the decode step. out[token * ROWS + row].
template <int T>
ONCE void few_dot(const uint8_t* w, const int8_t* x, size_t stride, int blocks, int32_t* out) {
    using namespace simd;
    Sums sums[CHAINS<T>][T][PARTS][4];
    for (auto& chain : sums)
        for (auto& token : chain)
            for (auto& part : token)
                for (auto& sum : part) sum = zero();
    for (int block = 0; block < blocks; block += CHAINS<T>)
        for (int c = 0; c < CHAINS<T>; c++, w += 64, x += BLOCK) {
            prefetch(w + AHEAD);
            for (int p = 0; p < PARTS; p++) {
                Bytes codes[4];
                spread(load(w + p * W), codes);
                for (int t = 0; t < T; t++)
                    for (int k = 0; k < 4; k++)
                        sums[c][t][p][k] = dot(sums[c][t][p][k], codes[k], four(x + t * stride + 4 * k));
            }
        }
    for (int t = 0; t < T; t++)
        for (int p = 0; p < PARTS; p++) {
            Sums sum = gather(sums[0][t][p]);
            for (int c = 1; c < CHAINS<T>; c++) sum = add(sum, gather(sums[c][t][p]));
            store(out + t * ROWS + p * W / 4, sum);
        }
}

// Codes + 1 of a group, a byte each: what pair<K> makes of each block, one after the other.
inline void unpack_group(const uint8_t* w, int blocks, uint8_t* codes) {
    using namespace simd;
    for (int block = 0; block < blocks; block++, w += 64, codes += 256) {
        prefetch(w + AHEAD);
        for (int p = 0; p < PARTS; p++) {
            const Bytes v = load(w + p * W);
            store(codes + p * W, pair<0>(v)), store(codes + 64 + p * W, pair<1>(v));
            store(codes + 128 + p * W, pair<2>(v)), store(codes + 192 + p * W, pair<3>(v));
        }
    }
}

// The same as few_dot with one sum for all codes, for more tokens than that has registers for. w is a packed group, or
// an unpacked one.
template <int T, bool UNPACKED>
ONCE void tile_dot(const uint8_t* w, const int8_t* x, size_t stride, int blocks, int32_t* out) {
    using namespace simd;
    Sums sums[T][PARTS];
    for (auto& token : sums)
        for (auto& sum : token) sum = zero();
    for (int block = 0; block < blocks; block++, w += UNPACKED ? 256 : 64, x += BLOCK) {
        const auto quarter = [&]<int K>() {
            Bytes codes[PARTS];
            for (int p = 0; p < PARTS; p++) codes[p] = UNPACKED ? load(w + 64 * K + p * W) : pair<K>(load(w + p * W));
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) {
                const Bytes in = four(x + t * stride + 4 * K);
                for (int p = 0; p < PARTS; p++) sums[t][p] = dot(sums[t][p], codes[p], in);
            }
        };
        quarter.template operator()<0>();
        quarter.template operator()<1>();
        quarter.template operator()<2>();
        quarter.template operator()<3>();
    }
    for (int t = 0; t < T; t++)
        for (int p = 0; p < PARTS; p++) store(out + t * ROWS + p * W / 4, sums[t][p]);
}

// Tokens whose sums fit into the registers, and from how many on it pays to unpack a group before.
constexpr int FEW = simd::W == 64 ? 4 : 1;
constexpr int TILE = simd::W == 64 ? 16 : 6;
constexpr int MANY = 4 * TILE;

template <int T>
inline void up_to(int tokens, const uint8_t* w, bool unpacked, const int8_t* x, size_t stride, int blocks,
                  int32_t* out) {
    if (tokens == T && unpacked) return tile_dot<T, true>(w, x, stride, blocks, out);
    if constexpr (T <= FEW) {
        if (tokens == T) return few_dot<T>(w, x, stride, blocks, out);
    } else if (tokens == T) {
        return tile_dot<T, false>(w, x, stride, blocks, out);
    }
    if constexpr (T > 1) up_to<T - 1>(tokens, w, unpacked, x, stride, blocks, out);
}

// One group of rows times `tokens` tokens; out[token * ROWS + row].
inline void group_dots(const uint8_t* w, const int8_t* x, size_t stride, int tokens, int blocks, int32_t* out) {
    thread_local std::vector<uint8_t> codes;
    if (tokens >= MANY) {
        codes.resize(std::max(codes.size(), size_t(blocks) * 256));
        unpack_group(w, blocks, codes.data());
        w = codes.data();
    }
    for (int t = 0; t < tokens; t += TILE)
        up_to<TILE>(std::min(TILE, tokens - t), w, tokens >= MANY, x + t * stride, stride, blocks, out + t * ROWS);
}
