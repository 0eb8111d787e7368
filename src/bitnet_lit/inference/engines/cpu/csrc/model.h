// A model as native.py describes it to the engine.
#pragma once

#include "head.h"

extern "C" {

struct Shape {
    int32_t hidden, layers, heads, kv_heads, head_dim, ffn, vocab, context, relu2, dense, head_bits, cache_type,
        threads;
    float eps, rope_theta;
};

struct Matrix {             // one of the three
    const uint8_t* packed;  // packing.h; times scale
    const float* floats;    // (O, I)
    const bfloat16* bfloats;
    float scale;
};

struct Layer {
    const float *input_norm, *attn_norm, *post_norm, *ffn_norm;  // null where there is none
    Matrix q, k, v, o, gate, up, down;
};

struct Weights {
    Matrix embedding, head;  // (vocab, hidden), dense
    const float* norm;
    const uint8_t* head_codes;  // head.h, where head_bits is not 32
    const HeadRows* head_rows;
    const int8_t* head_fine;  // (vocab, padded hidden), where head_bits is 4
};
}

// One row of a dense matrix times tokens of float32, `stride` from one to the next.
inline void dense_dots_of(const Matrix& m, int row, const float* x, size_t stride, int tokens, int inputs, float* out) {
    const size_t at = size_t(row) * inputs;
    if (m.floats) dense_row(m.floats + at, x, stride, tokens, inputs, out);
    else dense_row(m.bfloats + at, x, stride, tokens, inputs, out);
}
