// Linear layers with the same input, behind their norm: y = x_normalized @ weights.T. (q, k and v; o; or one layer.)
//
// The tokens are worked on in tiles, so that what one step writes is still in the cache for the next one.
//
// Letters: M tokens, I inputs, O outputs of all layers together.
#pragma once

#include "projection.h"

struct Linears {
    int32_t tokens, inputs, count, quantized, int8, threads;
    float limit;  // the largest code of an activation
    Fork fork;
    Matrix matrices[3];
    Norm norm;
    Activations h;   // kept for the backward pass
    const float* x;  // (M, I)
    float* y;        // (M, O)
    const float* d_y;
    int64_t d_y_row;
    float *d_x, *d_norm, *d_weight;  // d_weight (O, I)
    // Added to y, and to d_x; or NULL. A decoder layer adds its input to what its projections put out.
    const float *residual, *d_residual;
};

inline void linears_forward(const Linears& a) {
    const Projection projection(a.matrices, a.count, a.inputs, a.quantized, a.int8);
    const Threads threads{a.fork, a.threads};
    const int M = a.tokens, I = a.inputs, O = projection.outputs();
    float* const packed = scratch(10, projection.forward_floats());
    parallel_for(threads, projection.panels(), [&](int64_t panel) { projection.pack_forward(panel, packed); });
    parallel_for(threads, (M + TILE - 1) / TILE, [&](int64_t tile) {
        const int64_t first = tile * TILE;
        const int m = int(std::min<int64_t>(TILE, M - first));
        a.norm.forward(a.x + first * I, I, first, m, a.limit, a.h);
        projection.forward(packed, a.h, first, m, a.y + first * O, O);
        if (a.residual) add(a.y + first * O, a.residual + first * O, int64_t(m) * O, a.y + first * O);
    });
}

inline void linears_backward(const Linears& a) {
    const Projection projection(a.matrices, a.count, a.inputs, a.quantized, a.int8);
    const Threads threads{a.fork, a.threads};
    const int M = a.tokens, I = a.inputs;
    const int64_t tiles = (M + TILE - 1) / TILE;
    float* const packed = scratch(10, projection.backward_floats());
    float* const norm_sums = scratch(11, tiles * I);
    const Blocks rows = projection.row_blocks(a.threads);
    parallel_for(threads, rows.count, [&](int64_t i) { projection.pack_backward(rows.begin(i), rows.end(i), packed); });
    parallel_for(threads, tiles, [&](int64_t tile) {
        const int64_t first = tile * TILE;
        const int m = int(std::min<int64_t>(TILE, M - first));
        float *const d_x = a.d_x + first * I, *const d_norm = norm_sums + tile * I;
        projection.backward(packed, a.d_y + first * a.d_y_row, a.d_y_row, m, d_x, I);
        std::fill(d_norm, d_norm + I, 0.0f);
        a.norm.backward(a.x + first * I, I, first, m, d_x, d_norm);
        if (a.d_residual) add(d_x, a.d_residual + first * I, int64_t(m) * I, d_x);
    });
    if (a.d_norm) sum_of_tiles(norm_sums, tiles, I, I, a.d_norm);
    const Chunks chunks = projection.chunks(M);
    float* const inputs = scratch(12, chunks.floats());
    parallel_for(threads, chunks.count(), [&](int64_t i) { projection.pack_inputs(a.h, chunks, int(i), inputs); });
    parallel_for(threads, rows.count, [&](int64_t i) {
        projection.weight_gradient(rows.begin(i), rows.end(i), a.d_y, a.d_y_row, a.h, chunks, inputs, a.d_weight);
    });
}
