// The final norm, the head and the cross-entropy, with their gradients, in one pass: the logits are never all in
// memory.
//
//     h = norm(x); logits = h @ head.T; loss = mean(log(sum(exp(logits))) - logits[target])
//     d_logits = (softmax(logits) - one_hot(target)) / M; d_h = d_logits @ head; d_head = d_logits.T @ h
//
// The tokens are taken in chunks, whose d_logits fit in CHUNK_BYTES. Letters: M tokens, D hidden, V vocabulary.
#pragma once

#include "matmul.h"
#include "parallel.h"
#include "rows.h"

struct Loss {
    int32_t tokens, hidden, vocabulary, threads;
    float eps;
    Fork fork;
    const float *x, *gain, *head;  // (M, D), (D,), (V, D)
    const int64_t* targets;        // (M,)
    float* losses;                 // (M,)
    float *d_x, *d_gain, *d_head;  // of the mean loss
};

#include "split_loss.h"  // of a Loss

inline void next_token_loss(const Loss& t) {
    constexpr int TILE = LANES == 16 ? 64 : 4 * ROWS;
    constexpr int64_t CHUNK_BYTES = 32 << 20;
    if (SplitLoss::fits(t)) return SplitLoss(t).run();
    const int M = t.tokens, D = t.hidden, V = t.vocabulary;
    const Blocks words(V, 8 * ROWS, LANES == 16 ? 32 : ROWS, t.threads);
    const Threads threads{t.fork, t.threads};
    const int64_t most = std::max<int64_t>(1, CHUNK_BYTES / (int64_t(V) * 4 * TILE)) * TILE;
    const int chunk = int(std::min<int64_t>(M, most));
    const int64_t tiles = (M + TILE - 1) / TILE;
    float* const forward = scratch(10, panel_floats(D, V) + panel_floats(V, D));
    float* const backward = forward + panel_floats(D, V);
    float* const h = scratch(11, int64_t(chunk) * D);
    float* const d_logits = scratch(12, int64_t(chunk) * V);
    float* const gain_sums = scratch(13, tiles * D);
    parallel_for(threads, panels_of(V), [&](int64_t panel) {
        const int first = int(panel) * PANEL, rows = std::min(PANEL, V - first);
        pack_panel_transposed(D, rows, t.head + int64_t(first) * D, D, forward + int64_t(first) * D);
        for (int n = first; n < first + rows; n++)
            for (int j = 0; j < D; j += PANEL)
                pack_row(std::min(PANEL, D - j), t.head + int64_t(n) * D + j,
                         backward + int64_t(j) * V + int64_t(n) * PANEL);
    });
    for (int begin = 0; begin < M; begin += chunk) {
        const int tokens = std::min(chunk, M - begin);
        parallel_for(threads, (tokens + TILE - 1) / TILE, [&](int64_t tile) {
            const int64_t local = tile * TILE, first = begin + local;
            const int m = int(std::min<int64_t>(TILE, tokens - local));
            float *const rows = h + local * D, *const d = d_logits + local * V;
            float* const d_gain = gain_sums + (begin / TILE + tile) * D;
            float rstd[TILE];
            for (int i = 0; i < m; i++) {
                rstd[i] = inverse_rms(t.x + (first + i) * D, D, t.eps);
                normalize(t.x + (first + i) * D, t.gain, rstd[i], D, rows + int64_t(i) * D);
            }
            multiply(m, V, D, {rows, D, 1}, forward, d, V, false);
            for (int i = 0; i < m; i++) {
                float* const row = d + int64_t(i) * V;
                float largest = row[0], sum = 0;
#pragma omp simd reduction(max : largest)
                for (int j = 0; j < V; j++) largest = std::max(largest, row[j]);
                const int64_t target = t.targets[first + i];
                const float target_logit = row[target];
                FloatVec sums{};
                int j = 0;
                for (; j + LANES <= V; j += LANES) {
                    const FloatVec p = accurate_exp(load_floats(row + j) - largest);
                    store_floats(row + j, p);
                    sums += p;
                }
                for (; j < V; j++) sum += row[j] = accurate_exp(row[j] - largest);
                sum += horizontal_sum(sums);
                t.losses[first + i] = std::log(sum) + largest - target_logit;
                const float factor = 1.0f / (sum * float(M));
#pragma omp simd
                for (int k = 0; k < V; k++) row[k] *= factor;
                row[target] -= 1.0f / float(M);
            }
            multiply(m, D, V, {d, V, 1}, backward, t.d_x + first * D, D, false);
            std::fill(d_gain, d_gain + D, 0.0f);
            for (int i = 0; i < m; i++)
                normalize_backward(t.x + (first + i) * D, t.gain, rstd[i], D, t.d_x + (first + i) * D, d_gain);
        });
        const Chunks chunks{tokens, D, false};
        float* const inputs = scratch(14, chunks.floats());
        parallel_for(threads, chunks.count(),
                     [&](int64_t i) { chunks.pack(int(i), inputs, [&](int64_t token) { return h + token * D; }); });
        parallel_for(threads, words.count, [&](int64_t block) {
            const int row = words.begin(block), rows = words.end(block) - row;
            multiply_transposed(rows, d_logits + row, V, chunks, inputs, t.d_head + int64_t(row) * D, D, begin > 0);
        });
    }
    std::fill(t.d_gain, t.d_gain + D, 0.0f);
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int i = 0; i < D; i++) t.d_gain[i] += gain_sums[tile * D + i];
}
