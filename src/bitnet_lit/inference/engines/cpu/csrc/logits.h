// Logits by an integer head (head.h): all rows coarsely, and again more finely those that it matters for.
//
// A row that could be the best is computed again from the weights as they were. With 4 bits the best rows besides,
// about a twelfth, are computed again from 8.
#pragma once

#include <vector>

#include "model.h"
#include "threads.h"

constexpr int HEAD_PIECE = 8 * HEAD_GROUP;  // rows that a thread takes at once

// One of `parts` nearly equal parts of `count` things that stay together in units: [from, to).
inline std::pair<int, int> part_of(int part, int parts, int count, int unit) {
    const int64_t units = (count + unit - 1) / unit;
    const auto end = [&](int64_t part) { return int(std::min<int64_t>(count, units * part / parts * unit)); };
    return {end(part), end(part + 1)};
}

class IntegerHead {
   public:
    void reserve(int rows, int threads, int hidden) {
        const size_t each = padded(hidden);
        halves.reset(rows * 2 * each), fine.reset(rows * each), inputs.resize(rows);
        bounds_stride = round_up(rows, 64 / int(sizeof(float))), bounds.reset(size_t(bounds_stride) * threads);
        for (int i = 0; i < rows; i++)
            inputs[i] = {halves + 2 * i * each, halves + (2 * i + 1) * each, 0, 0, 0, fine + i * each, 0};
    }
    void begin(int wanted, int vocab) { reach.resize(std::max(reach.size(), size_t(wanted) * head_groups_of(vocab))); }

    template <int BITS>
    void take(const float* row, int hidden, int slot) {
        quantize_head_input<BITS>(row, hidden, inputs[slot]);
    }

    // Of `count` rows that were taken, `stride` apart, to `out`.
    template <int BITS>
    void logits(const Weights& w, const Shape& s, Pool& pool, const float* rows, size_t stride, int count, float* out) {
        const int groups = head_groups_of(s.vocab), quads = quads_of(s.hidden);
        for (int thread = 0; thread < pool.count; thread++)
            std::fill_n(bounds + size_t(thread) * bounds_stride, count, -INFINITY);
        pool.divide((s.vocab + HEAD_PIECE - 1) / HEAD_PIECE, [=, this, &w, &s, &pool](int thread, auto& next) {
            for (int piece; (piece = next()) >= 0;)
                for (int from = piece * HEAD_PIECE, to = std::min(s.vocab, from + HEAD_PIECE), g = from / HEAD_GROUP;
                     g < head_groups_of(to); g++) {
                    head_logits<BITS>(w.head_codes + g * head_group_bytes<BITS>(s.hidden), w.head_rows[g],
                                      std::min(HEAD_GROUP, to - g * HEAD_GROUP), inputs.data(), count, quads,
                                      out + g * HEAD_GROUP, s.vocab, &reach[g], groups);
                    for (int i = 0; i < count; i++) {
                        float& least = bounds[size_t(thread) * bounds_stride +
                                              i];  // of the best logit of what this thread computes
                        least = std::max(least, reach[size_t(i) * groups + g].least);
                    }
                }
        });
        pool.divide(pool.count, [=, this, &w, &s, &pool](int, auto& next) {
            for (int piece; (piece = next()) >= 0;) {
                const auto [from, to] = part_of(piece, pool.count, s.vocab, HEAD_GROUP);
                for (int i = 0; i < count; i++) {
                    float bound = -INFINITY;
                    for (int thread = 0; thread < pool.count; thread++)
                        bound = std::max(bound, bounds[size_t(thread) * bounds_stride + i]);
                    refine<BITS>(w, s, i, bound, rows + i * stride, from, to, out + size_t(i) * s.vocab);
                }
            }
        });
    }

   private:
    // Logits [from, to) of one row, again where they reach `bound`, and where they are among the best.
    template <int BITS>
    void refine(const Weights& w, const Shape& s, int index, float bound, const float* x, int from, int to,
                float* logits) const {
        thread_local std::vector<int> exact, finer;
        const int groups = head_groups_of(s.vocab);
        const Reach* of = &reach[size_t(index) * groups];
        const HeadInput& in = inputs[index];
        const float enough = BITS == 4 ? quartile_best(of, groups) : INFINITY;
        const auto fine_row = [&](int v) { return w.head_fine + size_t(v) * padded(s.hidden); };
        exact.clear(), finer.clear();
        for (int g = from / HEAD_GROUP; g < head_groups_of(to); g++) {
            if (of[g].most < bound && of[g].best < enough) continue;
            for (int v = g * HEAD_GROUP; v < std::min(to, (g + 1) * HEAD_GROUP); v++) {
                if (logits[v] + in.noise * w.head_rows[g].scale[v % HEAD_GROUP] >= bound) {
                    exact.push_back(v);
                    if (w.head.floats) prefetch(w.head.floats + size_t(v) * s.hidden, s.hidden);
                    else prefetch(w.head.bfloats + size_t(v) * s.hidden, s.hidden);
                } else if (logits[v] >= enough) {
                    finer.push_back(v);
                }
            }
        }
        // Rows from anywhere: the processor's own prefetching does not find them.
        for (size_t n = 0; n < finer.size(); n++) {
            if (n + FINE_AHEAD < finer.size()) prefetch(fine_row(finer[n + FINE_AHEAD]), s.hidden);
            const int v = finer[n];
            const float scale =
                w.head_rows[v / HEAD_GROUP].scale[v % HEAD_GROUP] * (float(LARGEST_CODE<4>) / 127.0f) * in.fine_step;
            logits[v] = float(fine_product(fine_row(v), in.fine, s.hidden)) * scale;
        }
        for (int v : exact) dense_dots_of(w.head, v, x, 0, 1, s.hidden, logits + v);
    }

    // What the best logits of three quarters of the groups reach: above it are about a twelfth of the rows. Every
    // thread finds it for itself, among all groups, so that a text does not depend on the number of threads.
    static float quartile_best(const Reach* groups, int count) {
        thread_local std::vector<float> bests;
        bests.clear();
        for (int g = 0; g < count; g++) bests.push_back(groups[g].best);
        const auto quarter = bests.begin() + count / 4;
        std::nth_element(bests.begin(), quarter, bests.end());
        return *quarter;
    }

    Buffer<uint8_t> halves;
    Buffer<int16_t> fine;
    Buffer<float> bounds;           // [thread][wanted row], a thread's in cache lines of its own
    int bounds_stride = 0;          // from one thread to the next
    std::vector<HeadInput> inputs;  // of wanted rows
    std::vector<Reach> reach;       // [wanted row][group]
};
