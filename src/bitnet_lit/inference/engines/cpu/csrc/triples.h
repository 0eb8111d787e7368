// Weights of 1.67 bits and their products with the int8 activations of a few tokens, for processors without a product
// of bytes that adds into 32 bits.
//
// Three codes are one of 27 numbers c0 + 3 c1 + 9 c2 from -13 to 13: four bits of magnitude and a sign. The sum of
// three activations under each of the 14 magnitudes is made once for all rows; a row finds its own by the instruction
// that chooses among sixteen bytes and takes it with its sign (element-wise lookup: Wang et al. 2025, bitnet.cpp,
// arXiv:2502.11880). Bytes do not hold such sums, so they are split, sum = SPLIT * high + low, and both parts are added
// up in bytes for a block, in 16 bits for a run of blocks. All of it is exact.
//
// A matrix of O rows and I inputs: rows in groups of 32, inputs in blocks of 24. A block of a group is 160 bytes:
// triple q of a row, its inputs q, q + 8 and q + 16, is in byte 32 * (q / 2) + place_of(row), low half for even q, and
// its sign in bit 7 - q of byte 128 + place_of(row). The blocks of a group follow each other: a thread reads one stream
// of memory.
#pragma once

#include <algorithm>

#include "floats.h"
#include "simd.h"

constexpr int BLOCK = 24, ROWS = 32, BLOCK_BYTES = 160;
constexpr int TRIPLES = BLOCK / 3, MAGNITUDES = 14;

inline int blocks_of(int inputs) { return round_up(inputs, BLOCK) / BLOCK; }

// Even bytes of words come out of sums before odd ones, and words in the order of simd::store_sums.
constexpr int place_of(int row) {
    return row % 2 * 2 + row / 2 % 2 * 16 + row / 4 % 2 * 4 + row / 8 % 2 * 8 + row / 16;
}

// The codes + 1 of a row in a block, a byte each, to `block`. All eight triples at once, a byte of a word each.
inline void pack_block(const uint8_t* codes, int row, uint8_t* block) {
    constexpr uint64_t EACH = 0x0101010101010101;
    uint64_t word[3];
    std::memcpy(word, codes, sizeof(word));
    const uint64_t shifted = word[0] + 3 * word[1] + 9 * word[2] + (128 - 13) * EACH;  // 128 is number 0
    const uint64_t negative = (~shifted >> 7) & EACH;
    const uint64_t magnitude = ((shifted ^ negative * 255) & 127 * EACH) + negative,
                   halves = magnitude | magnitude >> 4;
    block += place_of(row);
    for (int n = 0; n < 4; n++) block[32 * n] = uint8_t(halves >> 16 * n);
    block[128] = uint8_t(negative * 0x8040201008040201 >> 56);  // bit 8 q to bit 63 - q
}

// The digits of a magnitude, lowest first, in the order of the elements that `simd::choose` chooses among; `times`
// each.
template <class T>
struct Digits {
    alignas(32) T of[3][16]{};
    constexpr explicit Digits(int times) {
        for (int magnitude = 0; magnitude < MAGNITUDES; magnitude++)
            for (int k = 0, rest = magnitude; k < 3; k++) {
                const int digit = (rest + 1) % 3 - 1;
                of[k][magnitude] = T(times * digit), rest = (rest - digit) / 3;
            }
    }
};

constexpr int SPLIT =
    31;  // the largest sum, 381, is 12 * 31 + 9; what is left over is at most 15, and eight of those fit a byte

struct alignas(32) TripleSums {
    int8_t high[16], low[16];
};  // of three inputs, by magnitude

// The sums of the inputs x, padded with zeros to whole blocks.
ONCE inline void sum_triples(const int8_t* x, int blocks, TripleSums* to) {
    using namespace simd;
    static constexpr Digits<int16_t> digits{1};
    Words of[3];
    for (int k = 0; k < 3; k++) of[k] = load(digits.of[k]);
    for (int block = 0; block < blocks; block++, x += BLOCK)
        for (int q = 0; q < TRIPLES; q++, to++) {
            Words sum = words_signed_by(all_words(x[q]), of[0]);
            for (int k = 1; k < 3; k++) sum = add_words(sum, words_signed_by(all_words(x[q + k * TRIPLES]), of[k]));
            const Words high = rounded_product(sum, all_words(32768 / SPLIT));
            store(to, bytes_of(high, sub_words(sum, low_product(high, all_words(SPLIT)))));
        }
}

constexpr int RUN = 256;  // blocks before 16 bits are full: of 8 * 15 or 8 * 12 each

// One group of rows times T tokens, whose sums follow each other; sum(code * x), [token * ROWS + row].
template <int T>
ONCE void triple_dot(const uint8_t* w, const TripleSums* tokens, int blocks, int32_t* out) {
    using namespace simd;
    const Bytes one = all_bytes(1), start = all_words(128);
    Sums sums[T][4];
    for (auto& token : sums)
        for (auto& sum : token) sum = zero();
    for (int block = 0; block < blocks;) {
        // Of two bytes that share a word the first starts at 128 and carries nothing: the sum of the words is, modulo
        // 2**16, 256 times the second's and the first's with these 128.
        Words both[T][2], second[T][2];
        for (int t = 0; t < T; t++)
            for (int part = 0; part < 2; part++) both[t][part] = second[t][part] = all_words(0);
        const int from = block, end = std::min(blocks, block + RUN);
        for (; block < end; block++, w += BLOCK_BYTES) {
            for (int line = 0; line < BLOCK_BYTES; line += 64) prefetch(w + AHEAD + line);
            Bytes signs = load(w + 128), acc[T][2];
            for (auto& token : acc) token[0] = token[1] = start;
#pragma GCC unroll 8
            for (int q = 0; q < TRIPLES; q++) {
                const Bytes halves = load(w + q / 2 * 32),
                            magnitudes = q % 2 ? high_nibbles(halves) : low_nibbles(halves);
                const Bytes sign = any_of(signs, one);  // never zero
                signs = add_bytes(signs, signs);
                for (int t = 0; t < T; t++) {
                    const TripleSums& of = tokens[(t * blocks + block) * TRIPLES + q];
                    acc[t][0] = add_bytes(acc[t][0], signed_by(choose(sixteen(of.high), magnitudes), sign));
                    acc[t][1] = add_bytes(acc[t][1], signed_by(choose(sixteen(of.low), magnitudes), sign));
                    keep(acc[t][0]), keep(acc[t][1]);
                }
                keep(signs);
            }
            for (int t = 0; t < T; t++)
                for (int part = 0; part < 2; part++) {
                    both[t][part] = add_words(both[t][part], acc[t][part]);
                    second[t][part] = add_words(second[t][part], high_bytes(acc[t][part]));
                }
        }
        const Words starts = all_words(128 * (end - from));
        for (int t = 0; t < T; t++) {
            Words first[2];
            for (int part = 0; part < 2; part++)
                first[part] = sub_words(sub_words(both[t][part], times_256(second[t][part])), starts);
            add_weighted(first[0], first[1], SPLIT, sums[t][0], sums[t][1]);
            add_weighted(second[t][0], second[t][1], SPLIT, sums[t][2], sums[t][3]);
        }
    }
    for (int t = 0; t < T; t++)
        for (int half = 0; half < 2; half++)
            store_sums(out + t * ROWS + half * 16, sums[t][2 * half], sums[t][2 * half + 1]);
}

constexpr int TILE = 4;  // tokens whose sums fit into the registers

template <int T = TILE>
inline void up_to(int tokens, const uint8_t* w, const TripleSums* sums, int blocks, int32_t* out) {
    if (tokens == T) return triple_dot<T>(w, sums, blocks, out);
    if constexpr (T > 1) up_to<T - 1>(tokens, w, sums, blocks, out);
}

// One group of rows times `tokens` tokens; out[token * ROWS + row].
inline void group_dots(const uint8_t* w, const TripleSums* sums, int tokens, int blocks, int32_t* out) {
    for (int t = 0; t < tokens; t += TILE)
        up_to(std::min(TILE, tokens - t), w, sums + size_t(t) * blocks * TRIPLES, blocks, out + t * ROWS);
}
