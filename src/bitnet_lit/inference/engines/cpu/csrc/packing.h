// Weights on their way into the layout that the kernels of this processor read (packed_2bit.h or packed_5bit.h): from
// int8 codes, from the packed bytes of a model folder, or from latent weights, which are rounded here.
//
// Rows and inputs that fill up the last panel and the last block are code 0.
#pragma once

#include "simd.h"

#if defined(SIMD_LOOKUP)
#include "packed_5bit.h"
#else
#include "packed_2bit.h"
#endif

inline int panels_of(int rows) { return (rows + PANEL_ROWS - 1) / PANEL_ROWS; }
inline size_t panel_bytes(int inputs) { return size_t(blocks_of(inputs)) * BLOCK_BYTES; }

struct PanelRange {  // panels [first, last) of a packed matrix
    const uint8_t* packed;
    int first, last;
};

// Packs a matrix row by row. row(r, codes) writes the codes + 1 of row r, a byte each; `codes` has room for whole
// blocks.
template <class Row>
inline void pack_rows(int rows, int inputs, uint8_t* packed, const Row& row) {
    const int blocks = blocks_of(inputs);
    Buffer<uint8_t> codes{size_t(blocks) * BLOCK_INPUTS};
    std::memset(codes, 1, size_t(blocks) * BLOCK_INPUTS);
    for (int r = 0; r < panels_of(rows) * PANEL_ROWS; r++) {
        if (r < rows) row(r, codes.data);
        else std::memset(codes, 1, size_t(blocks) * BLOCK_INPUTS);
        uint8_t* panel = packed + r / PANEL_ROWS * panel_bytes(inputs);
        for (int block = 0; block < blocks; block++)
            pack_block(codes + block * BLOCK_INPUTS, r % PANEL_ROWS, panel + size_t(block) * BLOCK_BYTES);
    }
}

// From int8 codes (O, I) of -1, 0 and +1.
inline void pack_codes(const int8_t* codes, int rows, int inputs, uint8_t* packed) {
    pack_rows(rows, inputs, packed, [&](int r, uint8_t* to) {
        for (int i = 0; i < inputs; i++) to[i] = uint8_t(codes[size_t(r) * inputs + i] + 1);
    });
}

// From the packed bytes (O / 4, I) of a model folder (quant/packing.py): byte row r holds rows r, r + O / 4, r + O / 2,
// ... in its bit pairs, lowest first, as code + 1. Returns whether every pair was a code; 3 is none.
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

// How latent weights are rounded (quant/weights.py), and statistics of them, by which the caller checks scale and
// center.
struct Rounding {
    float scale, center;
    int32_t binary;         // codes are the signs of (weight - center) instead of weight / scale rounded
    double sum, magnitude;  // of all weights, and of all magnitudes
    int64_t below, above;   // weights whose magnitude is smaller and larger than the scale
};

template <class Weight>
inline void pack_latent(const Weight* weights, int rows, int inputs, Rounding& by, uint8_t* packed) {
    const float inverse = 1.0f / by.scale;
    by.sum = by.magnitude = 0, by.below = by.above = 0;
    pack_rows(rows, inputs, packed, [&](int r, uint8_t* to) {
        const Weight* row = weights + size_t(r) * inputs;
        float sum = 0, magnitude = 0;
        int32_t below = 0, above = 0;
#pragma omp simd reduction(+ : sum, magnitude, below, above)
        for (int i = 0; i < inputs; i++) {
            const float w = as_float(row[i]), size = std::fabs(w), scaled = w * inverse;
            // Rounding half to even, clamped to -1..1: exactly one half becomes 0.
            const int ternary = 1 + (scaled > 0.5f) - (scaled < -0.5f), binary = 2 * (w >= by.center);
            to[i] = uint8_t(by.binary ? binary : ternary);
            sum += w, magnitude += size, below += size<by.scale, above += size> by.scale;
        }
        by.sum += sum, by.magnitude += magnitude, by.below += below, by.above += above;
    });
}
