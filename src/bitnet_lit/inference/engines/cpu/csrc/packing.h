// Weights as they lie in a model folder to weights as the kernels of this processor read them: triples.h or pairs.h.
// Rows and inputs that do not exist are code 0.
#pragma once

#include "simd.h"

#if defined(SIMD_LOOKUP)
#include "triples.h"
#else
#include "pairs.h"
#endif

inline int groups_of(int rows) { return (rows + ROWS - 1) / ROWS; }
inline size_t group_bytes(int inputs) { return size_t(blocks_of(inputs)) * BLOCK_BYTES; }

struct Part {
    const uint8_t* packed;
    int first, last;
};  // groups [first, last) of a matrix

// row(r, codes) writes codes + 1 of row r, a byte each, to `codes`, which has room for whole blocks.
template <class Row>
inline void pack_rows(int rows, int inputs, uint8_t* packed, const Row& row) {
    const int blocks = blocks_of(inputs);
    Buffer<uint8_t> codes{size_t(blocks) * BLOCK};
    std::memset(codes, 1, size_t(blocks) * BLOCK);
    for (int r = 0; r < groups_of(rows) * ROWS; r++) {
        if (r < rows) row(r, codes.data);
        else std::memset(codes, 1, size_t(blocks) * BLOCK);
        uint8_t* group = packed + r / ROWS * group_bytes(inputs);
        for (int block = 0; block < blocks; block++)
            pack_block(codes + block * BLOCK, r % ROWS, group + size_t(block) * BLOCK_BYTES);
    }
}

// From int8 codes (O, I) in {-1, 0, +1}.
inline void pack_codes(const int8_t* codes, int rows, int inputs, uint8_t* packed) {
    pack_rows(rows, inputs, packed, [&](int r, uint8_t* to) {
        for (int i = 0; i < inputs; i++) to[i] = uint8_t(codes[size_t(r) * inputs + i] + 1);
    });
}

// From a folder's packed codes, quant/packing.py: byte row r of O / 4 holds the rows r, r + O/4, ... in its bit pairs.
// Returns whether every pair was a code.
inline bool pack_folder(const uint8_t* stored, int rows, int inputs, uint8_t* packed) {
    const int quarter = rows / 4;
    uint8_t wrong = 0;
    pack_rows(rows, inputs, packed, [&](int r, uint8_t* to) {
        const uint8_t* from = stored + size_t(r % quarter) * inputs;
        const int shift = 2 * (r / quarter);
        for (int i = 0; i < inputs; i++) {
            to[i] = from[i] >> shift & 3;
            wrong |= to[i] & to[i] >> 1;
        }
    });
    return !wrong;
}

// What a latent matrix is rounded by (quant/weights.py), and sums over it by which those numbers can be checked.
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
    pack_rows(rows, inputs, packed, [&](int r, uint8_t* to) {
        const W* row = weights + size_t(r) * inputs;
        float sum = 0, magnitude = 0;
        int32_t below = 0, above = 0;
#pragma omp simd reduction(+ : sum, magnitude, below, above)
        for (int i = 0; i < inputs; i++) {
            const float w = as_float(row[i]), size = std::fabs(w), scaled = w * inverse;
            // Rounding half to even and cutting at one: a half becomes 0.
            const int ternary = 1 + (scaled > 0.5f) - (scaled < -0.5f), binary = 2 * (w >= by.center);
            to[i] = uint8_t(by.binary ? binary : ternary);
            sum += w, magnitude += size, below += size<by.scale, above += size> by.scale;
        }
        by.sum += sum, by.magnitude += magnitude, by.below += below, by.above += above;
    });
}
