// Ternary weights in 2 bits, and their products with int8 activations: for processors whose product of bytes
// accumulates into int32 (AVX-512 VNNI, NEON dot product), and as plain loops for others without AVX2.
//
// Layout. A (O, I) matrix is cut into panels of 16 rows, and a panel into blocks of 16 inputs. A block is 64 bytes,
// four for each row. Byte j of a row holds its inputs j, j + 4, j + 8 and j + 12 in its bit pairs, lowest first, each
// as code + 1. One row's inputs 0..15, for example:
//
//     codes       +1 0 -1 0   0 +1 +1 0   -1 -1 0 +1   0 0 0 +1
//     code + 1     2 1  0 1   1  2  2 1    0  0 1  2   1 1 1  2
//     byte 0      inputs 0, 4, 8, 12: 2, 1, 0, 1 -> 0b01'00'01'10
//     byte 1      inputs 1, 5, 9, 13: 1, 2, 0, 1 -> 0b01'00'10'01
//
// So an int32 lane of a vector belongs to one row from the first block to the last, and no horizontal sums are needed.
// The blocks of a panel follow each other: a thread reads one stream of memory.
//
// Product. The kernels compute sum((code + 1) * x), because codes of 0..3 are cheap to unpack; the caller subtracts
// sum(x). All of it is exact in int32 for I < 2**18.
#pragma once

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "float_simd.h"
#include "simd.h"

constexpr int BLOCK_INPUTS = 16, PANEL_ROWS = 16, BLOCK_BYTES = 64;

// An even number: the kernels take two blocks at once.
inline int blocks_of(int inputs) { return round_up(inputs, 2 * BLOCK_INPUTS) / BLOCK_INPUTS; }

// Packs one row of a block; `codes` are BLOCK_INPUTS bytes of code + 1.
inline void pack_block(const uint8_t* codes, int row, uint8_t* block) {
    uint32_t words[4];  // byte j of word k is input 4 * k + j
    std::memcpy(words, codes, sizeof(words));
    const uint32_t word = words[0] | words[1] << 2 | words[2] << 4 | words[3] << 6;
    std::memcpy(block + 4 * row, &word, sizeof(word));
}

// Accumulators of each code and token that do not wait for each other: AVX-512's product takes several cycles.
template <int T>
constexpr int CHAINS = simd::WIDTH == 64 && T <= 2 ? 2 : 1;

// One panel times T tokens, for few tokens: bit pairs are isolated by masks alone, so each of the four has an
// accumulator of its own, and the accumulators are shifted at the end. x has `stride` bytes from one token to the next,
// zeros beyond the inputs up to a whole pair of blocks. out[token * PANEL_ROWS + row].
template <int T>
NOINLINE void panel_dot_masked(const uint8_t* w, const int8_t* x, size_t stride, int blocks, int32_t* out) {
    using namespace simd;
    Int32Vec sums[CHAINS<T>][T][VECTORS_PER_LINE][4];
    for (auto& chain : sums)
        for (auto& token : chain)
            for (auto& part : token)
                for (auto& sum : part) sum = zero();
    for (int block = 0; block < blocks; block += CHAINS<T>)
        for (int c = 0; c < CHAINS<T>; c++, w += 64, x += BLOCK_INPUTS) {
            prefetch(w + PREFETCH_BYTES);
            for (int p = 0; p < VECTORS_PER_LINE; p++) {
                ByteVec codes[4];
                isolate_bit_pairs(load(w + p * WIDTH), codes);
                for (int t = 0; t < T; t++)
                    for (int k = 0; k < 4; k++)
                        sums[c][t][p][k] = dot(sums[c][t][p][k], codes[k], broadcast_4(x + t * stride + 4 * k));
            }
        }
    for (int t = 0; t < T; t++)
        for (int p = 0; p < VECTORS_PER_LINE; p++) {
            Int32Vec sum = combine_bit_pairs(sums[0][t][p]);
            for (int c = 1; c < CHAINS<T>; c++) sum = add(sum, combine_bit_pairs(sums[c][t][p]));
            store(out + t * PANEL_ROWS + p * WIDTH / 4, sum);
        }
}

// The same with bit pairs shifted down first and one accumulator for all four, for more tokens than panel_dot_masked
// has registers for. w is a packed panel, or one of unpack_panel.
template <int T, bool UNPACKED>
NOINLINE void panel_dot_shifted(const uint8_t* w, const int8_t* x, size_t stride, int blocks, int32_t* out) {
    using namespace simd;
    Int32Vec sums[T][VECTORS_PER_LINE];
    for (auto& token : sums)
        for (auto& sum : token) sum = zero();
    for (int block = 0; block < blocks; block++, w += UNPACKED ? 256 : 64, x += BLOCK_INPUTS) {
        const auto bit_pair_dot = [&]<int K>() {
            ByteVec codes[VECTORS_PER_LINE];
            for (int p = 0; p < VECTORS_PER_LINE; p++)
                codes[p] = UNPACKED ? load(w + 64 * K + p * WIDTH) : bit_pair<K>(load(w + p * WIDTH));
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) {
                const ByteVec in = broadcast_4(x + t * stride + 4 * K);
                for (int p = 0; p < VECTORS_PER_LINE; p++) sums[t][p] = dot(sums[t][p], codes[p], in);
            }
        };
        bit_pair_dot.template operator()<0>();
        bit_pair_dot.template operator()<1>();
        bit_pair_dot.template operator()<2>();
        bit_pair_dot.template operator()<3>();
    }
    for (int t = 0; t < T; t++)
        for (int p = 0; p < VECTORS_PER_LINE; p++) store(out + t * PANEL_ROWS + p * WIDTH / 4, sums[t][p]);
}

// The codes + 1 of a panel, a byte each: of every block the four results of bit_pair, one after the other.
inline void unpack_panel(const uint8_t* w, int blocks, uint8_t* codes) {
    using namespace simd;
    for (int block = 0; block < blocks; block++, w += 64, codes += 256) {
        prefetch(w + PREFETCH_BYTES);
        for (int p = 0; p < VECTORS_PER_LINE; p++) {
            const ByteVec v = load(w + p * WIDTH);
            store(codes + p * WIDTH, bit_pair<0>(v)), store(codes + 64 + p * WIDTH, bit_pair<1>(v));
            store(codes + 128 + p * WIDTH, bit_pair<2>(v)), store(codes + 192 + p * WIDTH, bit_pair<3>(v));
        }
    }
}

// Tokens whose accumulators fit into the registers, in either kernel; and how many tokens make unpacking first
// worthwhile.
constexpr int MASKED_TOKENS = simd::WIDTH == 64 ? 4 : 1;
constexpr int TILE_TOKENS = simd::WIDTH == 64 ? 16 : 6;
constexpr int UNPACK_TOKENS = 4 * TILE_TOKENS;

// Selects the kernel for 1 to T tokens.
template <int T>
inline void panel_dot_tile(int tokens, const uint8_t* w, bool unpacked, const int8_t* x, size_t stride, int blocks,
                           int32_t* out) {
    if (tokens == T && unpacked) return panel_dot_shifted<T, true>(w, x, stride, blocks, out);
    if constexpr (T <= MASKED_TOKENS) {
        if (tokens == T) return panel_dot_masked<T>(w, x, stride, blocks, out);
    } else if (tokens == T) {
        return panel_dot_shifted<T, false>(w, x, stride, blocks, out);
    }
    if constexpr (T > 1) panel_dot_tile<T - 1>(tokens, w, unpacked, x, stride, blocks, out);
}

// One panel times any number of tokens: sum((code + 1) * x) to out[token * PANEL_ROWS + row].
inline void panel_dot(const uint8_t* w, const int8_t* x, size_t stride, int tokens, int blocks, int32_t* out) {
    thread_local std::vector<uint8_t> codes;
    if (tokens >= UNPACK_TOKENS) {
        codes.resize(std::max(codes.size(), size_t(blocks) * 256));
        unpack_panel(w, blocks, codes.data());
        w = codes.data();
    }
    for (int t = 0; t < tokens; t += TILE_TOKENS)
        panel_dot_tile<TILE_TOKENS>(std::min(TILE_TOKENS, tokens - t), w, tokens >= UNPACK_TOKENS, x + t * stride,
                                    stride, blocks, out + t * PANEL_ROWS);
}
