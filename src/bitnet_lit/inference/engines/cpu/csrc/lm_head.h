// Logits by the output head: in float, or in integers of 8 or 4 bits (lm_head_quantize.h) and then again, more exactly,
// for the tokens that matter.
//
// 1. Every row gets a logit from the integers, and a margin: six standard deviations of its error.
// 2. Any row that could be the likeliest token, logit + margin >= the largest logit - margin of all tokens, is computed
//    again from the float weights. So greedy decoding chooses the token that a float head would choose. Rows without a
//    token are never drawn, and so none of them sets the bound, however large its logit.
// 3. With 4 bits the best rows besides, about a twelfth of the vocabulary, are computed again from int8. What keeps the
//    coarse logit is unlikely.
#pragma once

#include <vector>

#include "lm_head_kernels.h"
#include "model.h"
#include "thread_pool.h"

constexpr int HEAD_CHUNK = 8 * HEAD_PANEL_ROWS;  // rows that a thread takes at once

class LmHead {
   public:
    // Memory for `rows` tokens.
    void reserve(int rows, int threads, int hidden) {
        const size_t each = padded(hidden);
        halves.reset(rows * 2 * each), int12.reset(rows * each), inputs.resize(rows);
        lower_stride = round_up(rows, 64 / int(sizeof(float))), lower.reset(size_t(lower_stride) * threads);
        for (int i = 0; i < rows; i++)
            inputs[i] = {halves + 2 * i * each, halves + (2 * i + 1) * each, 0, 0, 0, int12 + i * each, 0};
    }
    void reserve_logits(int wanted, int vocab) {
        bounds.resize(std::max(bounds.size(), size_t(wanted) * head_panels_of(vocab)));
    }

    // Rounds the activations of one token, after the final norm.
    template <int BITS>
    void quantize_input(const float* row, int hidden, int slot) {
        quantize_head_input<BITS>(row, hidden, inputs[slot]);
    }

    // Logits (count, vocab) of tokens whose activations are `rows`, `stride` floats from one to the next.
    static void float_logits(const Weights& w, const Shape& s, ThreadPool& pool, const float* rows, size_t stride,
                             int count, float* out) {
        pool.parallel_for((s.vocab + HEAD_CHUNK - 1) / HEAD_CHUNK, [=, &w, &s](int, auto& next_chunk) {
            for (int chunk; (chunk = next_chunk()) >= 0;)
                with_elements(w.head, [&](const auto* head) {
                    dense_matmul(head, chunk * HEAD_CHUNK, std::min(s.vocab, (chunk + 1) * HEAD_CHUNK), rows, stride,
                                 count, s.hidden,
                                 [&](int v, int token, float value) { out[size_t(token) * s.vocab + v] = value; });
                });
        });
    }

    // The same from integers, after quantize_input of each token.
    template <int BITS>
    void logits(const Weights& w, const Shape& s, ThreadPool& pool, const float* rows, size_t stride, int count,
                float* out) {
        const int panels = head_panels_of(s.vocab), quads = quads_of(s.hidden);
        for (int thread = 0; thread < pool.count; thread++)
            std::fill_n(lower + size_t(thread) * lower_stride, count, -INFINITY);
        pool.parallel_for((s.vocab + HEAD_CHUNK - 1) / HEAD_CHUNK, [=, this, &w, &s](int thread, auto& next_chunk) {
            for (int chunk; (chunk = next_chunk()) >= 0;) {
                const int from = chunk * HEAD_CHUNK, to = std::min(s.vocab, from + HEAD_CHUNK);
                for (int p = from / HEAD_PANEL_ROWS; p < head_panels_of(to); p++) {
                    const int first = p * HEAD_PANEL_ROWS;
                    head_logits<BITS>(w.head_codes + p * head_panel_bytes<BITS>(s.hidden), w.head_panels[p],
                                      std::min(HEAD_PANEL_ROWS, to - first), s.pieces - first, inputs.data(), count,
                                      quads, out + first, s.vocab, &bounds[p], panels);
                    for (int i = 0; i < count; i++) {
                        float& mine = lower[size_t(thread) * lower_stride + i];
                        mine = std::max(mine, bounds[size_t(i) * panels + p].lower);
                    }
                }
            }
        });
        pool.parallel_for(pool.count, [=, this, &w, &s, &pool](int, auto& next_chunk) {
            for (int chunk; (chunk = next_chunk()) >= 0;) {
                const auto [from, to] = part_of(chunk, pool.count, s.vocab, HEAD_PANEL_ROWS);
                for (int i = 0; i < count; i++) {
                    float bound = -INFINITY;
                    for (int thread = 0; thread < pool.count; thread++)
                        bound = std::max(bound, lower[size_t(thread) * lower_stride + i]);
                    refine<BITS>(w, s, i, bound, rows + i * stride, from, to, out + size_t(i) * s.vocab);
                }
            }
        });
    }

   private:
    static constexpr int PREFETCH_ROWS = 6;  // int8 rows that are prefetched ahead of their use

    // Logits [from, to) of token `index` again: from the float weights where they reach `bound` with their margin, from
    // int8 rows where they are among the best.
    template <int BITS>
    void refine(const Weights& w, const Shape& s, int index, float bound, const float* x, int from, int to,
                float* logits) const {
        thread_local std::vector<int> exact, finer;
        const int panels = head_panels_of(s.vocab);
        const PanelBounds* of = &bounds[size_t(index) * panels];
        const HeadInput& in = inputs[index];
        const float good = BITS == 4 ? lower_quartile_of_best(of, panels) : INFINITY;
        const auto row_scale = [&](int v) { return w.head_panels[v / HEAD_PANEL_ROWS].scale[v % HEAD_PANEL_ROWS]; };
        const auto int8_row = [&](int v) { return w.head_int8_rows + size_t(v) * padded(s.hidden); };
        const size_t row_bytes = w.head_rows.row_bytes(s.hidden);
        exact.clear(), finer.clear();
        for (int p = from / HEAD_PANEL_ROWS; p < head_panels_of(to); p++) {
            if (of[p].upper < bound && of[p].best < good) continue;
            for (int v = p * HEAD_PANEL_ROWS; v < std::min(to, (p + 1) * HEAD_PANEL_ROWS); v++) {
                if (logits[v] + in.margin * row_scale(v) >= bound) {
                    exact.push_back(v);
                    if (w.head_rows.memory) prefetch_row((const char*)w.head_rows.memory + v * row_bytes, row_bytes);
                } else if (logits[v] >= good) {
                    finer.push_back(v);
                }
            }
        }
        for (size_t n = 0; n < finer.size(); n++) {
            // These rows may be anywhere: the hardware prefetcher does not find them.
            if (n + PREFETCH_ROWS < finer.size()) prefetch_row(int8_row(finer[n + PREFETCH_ROWS]), s.hidden);
            const int v = finer[n];
            const float scale = row_scale(v) * (float(MAX_CODE<4>) / 127.0f) * in.int12_scale;
            logits[v] = float(int8_int12_dot(int8_row(v), in.int12, s.hidden)) * scale;
        }
        for (int v : exact)
            with_row(w.head_rows, v, s.hidden,
                     [&](const auto* row) { dense_row_dot(row, x, 0, 1, s.hidden, logits + v); });
    }

    // The lower quartile of the panels' best logits: three quarters of the panels reach it, with about a twelfth of all
    // rows. Every thread computes it from all panels, so that logits do not depend on the number of threads.
    static float lower_quartile_of_best(const PanelBounds* panels, int count) {
        thread_local std::vector<float> best;
        best.clear();
        for (int p = 0; p < count; p++) best.push_back(panels[p].best);
        const auto quarter = best.begin() + count / 4;
        std::nth_element(best.begin(), quarter, best.end());
        return *quarter;
    }

    Buffer<uint8_t> halves;
    Buffer<int16_t> int12;
    Buffer<float> lower;   // [thread][token] largest logit - margin that the thread saw; in its own cache lines
    int lower_stride = 0;  // floats from one thread to the next
    std::vector<HeadInput> inputs;    // [token]
    std::vector<PanelBounds> bounds;  // [token][panel]
};
