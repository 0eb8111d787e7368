// Weights as they lie in a model folder to weights as the kernels read them.
//
// A ternary matrix of O rows and I inputs: rows in groups of 16, inputs in blocks of 16. A block of a group is 64 bytes, four
// for each row; byte j of a row holds its inputs j, j + 4, j + 8, j + 12 in its bit pairs, lowest first, each as code + 1. So
// a 32-bit lane belongs to one row from beginning to end, and no sum has to be collected from several lanes. The blocks of
// a group follow each other: a thread reads one stream of memory. Rows and inputs that do not exist are code 0.
#pragma once

#include "floats.h"

constexpr int BLOCK = 16, ROWS = 16;

inline int blocks_of(int inputs) { return round_up(inputs, 2 * BLOCK) / BLOCK; }  // even: kernels take two at once
inline int groups_of(int rows) { return (rows + ROWS - 1) / ROWS; }
inline size_t group_bytes(int inputs) { return size_t(blocks_of(inputs)) * 64; }

// Sixteen codes + 1, a byte each, to the four bytes of a row in a block: byte j of word k is input 4 * k + j.
inline uint32_t pack_block(const uint8_t* pairs) {
    uint32_t words[4];
    std::memcpy(words, pairs, sizeof(words));
    return words[0] | words[1] << 2 | words[2] << 4 | words[3] << 6;
}

// row(r, pairs) writes codes + 1 of row r to `pairs`, which has room for whole blocks.
template <class Row>
inline void pack_rows(int rows, int inputs, uint8_t* packed, const Row& row) {
    const int blocks = blocks_of(inputs);
    Buffer<uint8_t> pairs{size_t(blocks) * BLOCK};
    std::memset(pairs, 1, size_t(blocks) * BLOCK);
    for (int r = 0; r < groups_of(rows) * ROWS; r++) {
        if (r < rows) row(r, pairs.data);
        else std::memset(pairs, 1, size_t(blocks) * BLOCK);
        uint8_t* place = packed + r / ROWS * group_bytes(inputs) + r % ROWS * 4;
        for (int block = 0; block < blocks; block++) {
            const uint32_t word = pack_block(pairs + block * BLOCK);
            std::memcpy(place + size_t(block) * 64, &word, 4);
        }
    }
}

// From int8 codes (O, I) in {-1, 0, +1}.
inline void pack_codes(const int8_t* codes, int rows, int inputs, uint8_t* packed) {
    pack_rows(rows, inputs, packed, [&](int r, uint8_t* pairs) {
        for (int i = 0; i < inputs; i++) pairs[i] = uint8_t(codes[size_t(r) * inputs + i] + 1);
    });
}

// From a folder's packed codes, quant/packing.py: byte row r of O / 4 holds the rows r, r + O/4, ... in its bit pairs.
// Returns whether every pair was a code.
inline bool pack_folder(const uint8_t* stored, int rows, int inputs, uint8_t* packed) {
    const int quarter = rows / 4;
    uint8_t wrong = 0;
    pack_rows(rows, inputs, packed, [&](int r, uint8_t* pairs) {
        const uint8_t* from = stored + size_t(r % quarter) * inputs;
        const int shift = 2 * (r / quarter);
        for (int i = 0; i < inputs; i++) {
            pairs[i] = from[i] >> shift & 3;
            wrong |= pairs[i] & pairs[i] >> 1;
        }
    });
    return !wrong;
}

// What a latent matrix is rounded by (quant/functional.py), and sums over it by which those numbers can be checked.
struct Rounding {
    float scale, center;
    int32_t binary;
    double sum, magnitude;
    int64_t below, above;  // weights of smaller and of larger magnitude than the scale
};

template <class W>
inline void pack_latent(const W* weights, int rows, int inputs, Rounding& by, uint8_t* packed) {
    const float inverse = 1.0f / by.scale;
    by.sum = by.magnitude = 0, by.below = by.above = 0;
    pack_rows(rows, inputs, packed, [&](int r, uint8_t* pairs) {
        const W* row = weights + size_t(r) * inputs;
        float sum = 0, magnitude = 0;
        int32_t below = 0, above = 0;
#pragma omp simd reduction(+ : sum, magnitude, below, above)
        for (int i = 0; i < inputs; i++) {
            const float w = as_float(row[i]), size = std::fabs(w), scaled = w * inverse;
            // Rounding half to even and cutting at one: a half becomes 0.
            const int ternary = 1 + (scaled > 0.5f) - (scaled < -0.5f), binary = 2 * (w >= by.center);
            pairs[i] = uint8_t(by.binary ? binary : ternary);
            sum += w, magnitude += size, below += size < by.scale, above += size > by.scale;
        }
        by.sum += sum, by.magnitude += magnitude, by.below += below, by.above += above;
    });
}
