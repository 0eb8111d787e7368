// Integer products of packed weights (packing.h) and int8 activations.
//
// What is computed is sum((code + 1) * x); sum(x) is taken off at the end. All of it is exact in 32 bits for I < 2**18.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "packing.h"
#include "simd.h"

constexpr int PARTS = 64 / simd::W;  // vectors in a block

// How far ahead weights are asked for, into the second cache: the hardware's own prefetching stops at every 4 KiB page, and
// a step reads each weight once. Half as fast again from memory (Sapphire Rapids); beyond the end of a matrix it is a no-op.
constexpr int AHEAD = 4096;
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
template <class T>
inline void prefetch(const T* row, int count) {  // all of a row
    for (size_t at = 0; at < size_t(count) * sizeof(T); at += 64) prefetch((const char*)row + at);
}

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

// The same as few_dot with one sum for all codes, for more tokens than that has registers for. w is a packed group, or an
// unpacked one.
template <int T, bool UNPACKED>
ONCE void tile_dot(const uint8_t* w, const int8_t* x, size_t stride, int blocks, int32_t* out) {
    using namespace simd;
    std::memset(out, 0, size_t(T) * ROWS * sizeof(int32_t));
    for (int block = 0; block < blocks;) {
        Partial acc[T][PARTS];
        for (auto& token : acc)
            for (auto& a : token) a = zero();
        const int end = std::min(blocks, block + RUN);
        for (; block < end; block++, w += UNPACKED ? 256 : 64, x += BLOCK) {
            const auto quarter = [&]<int K>() {
                Bytes codes[PARTS];
                for (int p = 0; p < PARTS; p++) codes[p] = UNPACKED ? load(w + 64 * K + p * W) : pair<K>(load(w + p * W));
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

// Tokens whose sums fit into the registers, and from how many on it pays to unpack a group before.
constexpr int FEW = simd::W == 64 ? 4 : 1;
constexpr int TILE = simd::W == 64 ? 16 : simd::W == 32 ? 4 : 6;
constexpr int MANY = 4 * TILE;

template <int T>
inline void up_to(int tokens, const uint8_t* w, bool unpacked, const int8_t* x, size_t stride, int blocks, int32_t* out) {
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
