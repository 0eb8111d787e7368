// The gated feed-forward layer, behind its norm:
//
//     h = norm(x); gate, up = gate_up(h); hf = sub_norm(act(gate) * up); y = down(hf)
//
// Letters: M tokens, D hidden, F feed-forward.
#pragma once

#include "projection.h"

struct GatedMlp {
    int32_t tokens, hidden, ffn, relu2, quantized, int8, threads;
    float limit;
    Fork fork;
    Matrix gate_up[2], down;
    Norm norm, sub_norm;
    Activations h, hf;  // kept for the backward pass, as are the gates
    float* gates;       // (M, 2 F): gate, then up
    const float* x;
    float* y;
    const float* d_y;
    float *d_x, *d_norm, *d_sub_norm, *d_gate_up, *d_down;
    const float *residual, *d_residual;  // added to y, and to d_x; or NULL
};

inline void gated_mlp_forward(const GatedMlp& a) {
    const Threads threads{a.fork, a.threads};
    const int M = a.tokens, D = a.hidden, F = a.ffn;
    const Projection gate_up(a.gate_up, 2, D, a.quantized, a.int8), down(&a.down, 1, F, a.quantized, a.int8);
    float* const packed = scratch(10, gate_up.forward_floats());
    float* const packed_down = scratch(11, down.forward_floats());
    parallel_for(threads, gate_up.panels() + down.panels(), [&](int64_t panel) {
        if (panel < gate_up.panels()) gate_up.pack_forward(panel, packed);
        else down.pack_forward(panel - gate_up.panels(), packed_down);
    });
    parallel_for(threads, (M + TILE - 1) / TILE, [&](int64_t tile) {
        const int64_t first = tile * TILE;
        const int m = int(std::min<int64_t>(TILE, M - first));
        float *const gates = a.gates + first * 2 * F, *const act = scratch(12, int64_t(TILE) * F);
        a.norm.forward(a.x + first * D, D, first, m, a.limit, a.h);
        gate_up.forward(packed, a.h, first, m, gates, 2 * F);
        for (int i = 0; i < m; i++) {
            const float* const gate = gates + int64_t(i) * 2 * F;
            gate_forward(gate, gate + F, F, a.relu2, act + int64_t(i) * F, nullptr);
        }
        a.sub_norm.forward(act, F, first, m, a.limit, a.hf);
        down.forward(packed_down, a.hf, first, m, a.y + first * D, D);
        if (a.residual) add(a.y + first * D, a.residual + first * D, int64_t(m) * D, a.y + first * D);
    });
}

inline void gated_mlp_backward(const GatedMlp& a) {
    const Threads threads{a.fork, a.threads};
    const int M = a.tokens, D = a.hidden, F = a.ffn;
    const int64_t tiles = (M + TILE - 1) / TILE;
    const Projection gate_up(a.gate_up, 2, D, a.quantized, a.int8), down(&a.down, 1, F, a.quantized, a.int8);
    float* const packed = scratch(10, gate_up.backward_floats());
    float* const packed_down = scratch(11, down.backward_floats());
    float* const norm_sums = scratch(13, tiles * (D + F));
    float* const d_gates = scratch(14, int64_t(M) * 2 * F);
    const Blocks gate_rows = gate_up.row_blocks(a.threads), down_rows = down.row_blocks(a.threads);
    const auto for_weight_rows = [&](const auto& of_down, const auto& of_gate_up) {
        parallel_for(threads, down_rows.count + gate_rows.count, [&](int64_t i) {
            const int64_t j = i - down_rows.count;
            if (j < 0) of_down(down_rows.begin(i), down_rows.end(i));
            else of_gate_up(gate_rows.begin(j), gate_rows.end(j));
        });
    };
    for_weight_rows([&](int begin, int end) { down.pack_backward(begin, end, packed_down); },
                    [&](int begin, int end) { gate_up.pack_backward(begin, end, packed); });
    parallel_for(threads, tiles, [&](int64_t tile) {
        const int64_t first = tile * TILE;
        const int m = int(std::min<int64_t>(TILE, M - first));
        float *const d_act = scratch(12, int64_t(TILE) * F), *const act = scratch(15, F),
                     *const sigmoid = scratch(16, F);
        float *const d_norm = norm_sums + tile * (D + F), *const d_sub_norm = d_norm + D;
        std::fill(d_norm, d_norm + D + F, 0.0f);
        down.backward(packed_down, a.d_y + first * D, D, m, d_act, F);
        for (int i = 0; i < m; i++) {
            const float *const gate = a.gates + (first + i) * 2 * F, *const up = gate + F;
            float *const d_gate = d_gates + (first + i) * 2 * F, *const d = d_act + int64_t(i) * F;
            prefetch_row(gate + 4 * F, 2 * F);  // of the token after the next: the forward pass wrote it long ago
            gate_forward(gate, up, F, a.relu2, act, sigmoid);
            a.sub_norm.backward(act, F, first + i, 1, d, d_sub_norm);
            gate_backward(gate, up, sigmoid, d, F, a.relu2, d_gate, d_gate + F);
        }
        float* const d_x = a.d_x + first * D;
        gate_up.backward(packed, d_gates + first * 2 * F, 2 * F, m, d_x, D);
        a.norm.backward(a.x + first * D, D, first, m, d_x, d_norm);
        if (a.d_residual) add(d_x, a.d_residual + first * D, int64_t(m) * D, d_x);
    });
    if (a.d_norm) sum_of_tiles(norm_sums, tiles, D + F, D, a.d_norm);
    if (a.d_sub_norm) sum_of_tiles(norm_sums + D, tiles, D + F, F, a.d_sub_norm);
    const Chunks chunks = gate_up.chunks(M), down_chunks = down.chunks(M);
    float *const inputs = scratch(17, chunks.floats()), *const down_inputs = scratch(18, down_chunks.floats());
    parallel_for(threads, chunks.count(), [&](int64_t i) {
        gate_up.pack_inputs(a.h, chunks, int(i), inputs);
        down.pack_inputs(a.hf, down_chunks, int(i), down_inputs);
    });
    for_weight_rows([&](int begin, int end) {
        down.weight_gradient(begin, end, a.d_y, D, a.hf, down_chunks, down_inputs, a.d_down);
    }, [&](int begin, int end) {
        gate_up.weight_gradient(begin, end, d_gates, 2 * F, a.h, chunks, inputs, a.d_gate_up);
    });
}
