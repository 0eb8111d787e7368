// Ternary weights in 5 bits for three (1.67 bits a weight), and their products with the int8 activations of a few
// tokens: for AVX2, which has no product of bytes that accumulates into int32.
//
// Code. Three codes are one number c0 + 3 c1 + 9 c2 of -13..13: a magnitude of four bits and a sign. For example
//
//     codes +1, -1, +1  ->  1 - 3 + 9 =  7  ->  magnitude  7, sign +
//     codes +1, -1, -1  ->  1 - 3 - 9 = -11 ->  magnitude 11, sign -     (the codes of +11 are -1, +1, +1)
//
// Product. The sum of three activations under each of the 14 magnitudes is put into a table once, for all rows. A row
// looks up its magnitude by `pshufb`, which selects from sixteen bytes, and applies the sign. (Element-wise lookup with
// a separate sign is TL2 of bitnet.cpp: Wang et al. 2025, arXiv:2502.11880.) A byte does not hold such a sum, so tables
// hold it in two parts, sum = SPLIT * high + low. Both parts are accumulated in int8 within a block and in int16 over
// several blocks, before either can overflow. All of it is exact.
//
// Layout. A (O, I) matrix is cut into panels of 32 rows, and a panel into blocks of 24 inputs, eight triples. A block
// is 160 bytes. Triple q of a row holds its inputs q, q + 8 and q + 16. Its magnitude is in byte 32 * (q / 2) +
// byte_of_row(row), in the lower half for even q; its sign is bit 7 - q of byte 128 + byte_of_row(row), 1 for negative.
// The blocks of a panel follow each other: a thread reads one stream of memory.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "float_simd.h"
#include "simd.h"

constexpr int BLOCK_INPUTS = 24, PANEL_ROWS = 32, BLOCK_BYTES = 160;
constexpr int TRIPLES = BLOCK_INPUTS / 3, MAGNITUDES = 14;

inline int blocks_of(int inputs) { return round_up(inputs, BLOCK_INPUTS) / BLOCK_INPUTS; }

// The byte of a row within 32. The kernels take even and odd bytes apart and interleave int16 lanes; this order undoes
// both, so that results come out in the order of the rows (simd_avx2.h, store_sums).
constexpr int byte_of_row(int row) {
    return row % 2 * 2 + row / 2 % 2 * 16 + row / 4 % 2 * 4 + row / 8 % 2 * 8 + row / 16;
}

// Packs one row of a block; `codes` are BLOCK_INPUTS bytes of code + 1. All eight triples are computed at once, each in
// a byte of a 64-bit word.
inline void pack_block(const uint8_t* codes, int row, uint8_t* block) {
    constexpr uint64_t EACH = 0x0101010101010101;
    uint64_t word[3];
    std::memcpy(word, codes, sizeof(word));
    const uint64_t biased = word[0] + 3 * word[1] + 9 * word[2] + (128 - 13) * EACH;  // the number + 128
    const uint64_t negative = (~biased >> 7) & EACH;
    const uint64_t magnitude = ((biased ^ negative * 255) & 127 * EACH) + negative;
    const uint64_t nibbles = magnitude | magnitude >> 4;
    block += byte_of_row(row);
    for (int n = 0; n < 4; n++) block[32 * n] = uint8_t(nibbles >> 16 * n);
    block[128] = uint8_t(negative * 0x8040201008040201 >> 56);  // gathers bit 0 of byte q into bit 7 - q
}

// The three codes of each magnitude, times `factor`: of[k][magnitude] belongs to input k of a triple.
template <class T>
struct TernaryDigits {
    alignas(32) T of[3][16]{};
    constexpr explicit TernaryDigits(int factor) {
        for (int magnitude = 0; magnitude < MAGNITUDES; magnitude++)
            for (int k = 0, rest = magnitude; k < 3; k++) {
                const int digit = (rest + 1) % 3 - 1;
                of[k][magnitude] = T(factor * digit), rest = (rest - digit) / 3;
            }
    }
};

// The largest sum is 3 * 127 = 381 = 12 * 31 + 9. `high` is at most 12 and `low` at most 15, so eight of either fit a
// byte.
constexpr int SPLIT = 31;

struct alignas(32) TripleTable {  // sums of three activations by magnitude: SPLIT * high + low
    int8_t high[16], low[16];
};

// The tables of all triples of one token; x is padded with zeros to whole blocks.
NOINLINE inline void build_triple_tables(const int8_t* x, int blocks, TripleTable* to) {
    using namespace simd;
    static constexpr TernaryDigits<int16_t> digits{1};
    Int16Vec of[3];
    for (int k = 0; k < 3; k++) of[k] = load(digits.of[k]);
    for (int block = 0; block < blocks; block++, x += BLOCK_INPUTS)
        for (int q = 0; q < TRIPLES; q++, to++) {
            Int16Vec sum = sign_int16(set1_int16(x[q]), of[0]);
            for (int k = 1; k < 3; k++) sum = add_int16(sum, sign_int16(set1_int16(x[q + k * TRIPLES]), of[k]));
            const Int16Vec high = mul_round_int16(sum, set1_int16(32768 / SPLIT));
            store(to, narrow_to_int8(high, sub_int16(sum, mul_low_int16(high, set1_int16(SPLIT)))));
        }
}

constexpr int MAX_BLOCKS_INT16 = 256;  // blocks of 8 * 15 or 8 * 12 each before an int16 overflows

// One panel times T tokens, whose tables follow each other: sum(code * x) to out[token * PANEL_ROWS + row].
template <int T>
NOINLINE void panel_dot_tokens(const uint8_t* w, const TripleTable* tables, int blocks, int32_t* out) {
    using namespace simd;
    const ByteVec one = set1_int8(1), start = set1_int16(128);
    Int32Vec sums[T][4];
    for (auto& token : sums)
        for (auto& sum : token) sum = zero();
    for (int block = 0; block < blocks;) {
        // Bytes are accumulated in pairs, as int16 lanes. The even byte of a lane starts at 128, so it never borrows
        // from the odd one, and a lane is 256 * odd + even + 128. `both` sums the lanes modulo 2**16, `odd` sums the
        // odd bytes; the even bytes follow from the two.
        Int16Vec both[T][2], odd[T][2];
        for (int t = 0; t < T; t++)
            for (int part = 0; part < 2; part++) both[t][part] = odd[t][part] = set1_int16(0);
        const int from = block, end = std::min(blocks, block + MAX_BLOCKS_INT16);
        for (; block < end; block++, w += BLOCK_BYTES) {
            for (int line = 0; line < BLOCK_BYTES; line += 64) prefetch(w + PREFETCH_BYTES + line);
            ByteVec signs = load(w + 128), acc[T][2];
            for (auto& token : acc) token[0] = token[1] = start;
#pragma GCC unroll 8
            for (int q = 0; q < TRIPLES; q++) {
                const ByteVec nibbles = load(w + q / 2 * 32);
                const ByteVec magnitudes = q % 2 ? high_nibbles(nibbles) : low_nibbles(nibbles);
                const ByteVec sign = or_bytes(signs, one);  // the top bit decides; `one` keeps it from being zero
                signs = add_int8(signs, signs);             // the next triple's sign to the top bit
                for (int t = 0; t < T; t++) {
                    const TripleTable& table = tables[(t * blocks + block) * TRIPLES + q];
                    const ByteVec high = shuffle_bytes(broadcast_16(table.high), magnitudes);
                    const ByteVec low = shuffle_bytes(broadcast_16(table.low), magnitudes);
                    acc[t][0] = add_int8(acc[t][0], sign_int8(high, sign));
                    acc[t][1] = add_int8(acc[t][1], sign_int8(low, sign));
                    keep_in_register(acc[t][0]), keep_in_register(acc[t][1]);
                }
                keep_in_register(signs);
            }
            for (int t = 0; t < T; t++)
                for (int part = 0; part < 2; part++) {
                    both[t][part] = add_int16(both[t][part], acc[t][part]);
                    odd[t][part] = add_int16(odd[t][part], high_int8(acc[t][part]));
                }
        }
        const Int16Vec starts = set1_int16(128 * (end - from));
        for (int t = 0; t < T; t++) {
            Int16Vec even[2];
            for (int part = 0; part < 2; part++)
                even[part] = sub_int16(sub_int16(both[t][part], shift_left_8(odd[t][part])), starts);
            add_scaled(even[0], even[1], SPLIT, sums[t][0], sums[t][1]);
            add_scaled(odd[t][0], odd[t][1], SPLIT, sums[t][2], sums[t][3]);
        }
    }
    for (int t = 0; t < T; t++)
        for (int half = 0; half < 2; half++)
            store_sums(out + t * PANEL_ROWS + half * 16, sums[t][2 * half], sums[t][2 * half + 1]);
}

constexpr int TILE_TOKENS = 4;  // tokens whose accumulators fit into the registers

// Selects the kernel for 1 to T tokens.
template <int T = TILE_TOKENS>
inline void panel_dot_tile(int tokens, const uint8_t* w, const TripleTable* tables, int blocks, int32_t* out) {
    if (tokens == T) return panel_dot_tokens<T>(w, tables, blocks, out);
    if constexpr (T > 1) panel_dot_tile<T - 1>(tokens, w, tables, blocks, out);
}

// One panel times any number of tokens: sum(code * x) to out[token * PANEL_ROWS + row].
inline void panel_dot(const uint8_t* w, const TripleTable* tables, int tokens, int blocks, int32_t* out) {
    for (int t = 0; t < tokens; t += TILE_TOKENS)
        panel_dot_tile(std::min(TILE_TOKENS, tokens - t), w, tables + size_t(t) * blocks * TRIPLES, blocks,
                       out + t * PANEL_ROWS);
}
