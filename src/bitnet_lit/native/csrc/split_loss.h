// The loss and its gradients (loss.h) on the matrix unit (amx.h).
//
// The products need exp(logits) in two orders: the words of a token for d_h, the tokens of a word for d_head. Each
// block of 64 tokens and 32 words is split into both while it is in the L1 cache, so no logit is written to memory.
// What softmax needs of a whole row comes later:
//
//     p = exp(logits - shift); total = sum(p); d_h = (p / total - one_hot) @ head / M; d_head likewise
//
// The shift may be any number near the largest logit. It is the largest one of the first 32 words; where another logit
// lies more than MOST_ABOVE above it, the tile is computed again. The target's part is p / total - 1, which the
// rounding of a product would spoil where it is close to 0. So the products leave the target out, and its part, -(sum
// of the other p) / total, is added in float32.
#pragma once

#include "matmul.h"
#include "parallel.h"
#include "rows.h"

class SplitLoss {
   public:
    static bool fits(const Loss& t) {
        return has_amx() && t.hidden % 32 == 0 && t.hidden >= AMX_SIZE && t.vocabulary % 32 == 0;
    }

    explicit SplitLoss(const Loss& t)
        : t(t), threads{t.fork, t.threads}, M(t.tokens), D(t.hidden), V(t.vocabulary), chunk(chunk_of(t)) {}

    void run() const {
        parallel_for(threads, V / WORDS, [&](int64_t panel) { pack_head(int(panel) * WORDS); });
        for (int begin = 0; begin < M; begin += chunk) {
            const int tokens = std::min(chunk, M - begin);
            const Blocks tiles(tokens, TILE_TOKENS, SUB, t.threads);
            parallel_for(threads, tiles.count, [&](int64_t tile) {
                compute_tile(begin, tiles.begin(tile), tiles.end(tile) - tiles.begin(tile), tokens);
            });
            const Chunks chunks{tokens, D, true};
            parallel_for(threads, chunks.count(), [&](int64_t i) {
                float* const row = scratch(0, D);
                chunks.pack(int(i), inputs, [&](int64_t token) {
                    const float *const from = h + token * D, factor = factors[begin + token];
#pragma omp simd
                    for (int d = 0; d < D; d++) row[d] = from[d] * factor;
                    return row;
                });
            });
            const Blocks words(V, 8 * WORDS, WORDS, t.threads);
            parallel_for(threads, words.count, [&](int64_t block) {
                head_gradient(begin, tokens, words.begin(block), words.end(block), chunks);
            });
        }
        std::fill(t.d_gain, t.d_gain + D, 0.0f);
        for (int i = 0; i < subs_of(M); i++) add(t.d_gain, gain_sums + int64_t(i) * D, D, t.d_gain);
    }

   private:
    static constexpr int WORDS = 32;                  // a panel
    static constexpr int SUB = 64;                    // tokens whose logits of a panel fit in the L1 cache
    static constexpr int TILE_TOKENS = 256;           // tokens for which the head is read once
    static constexpr int GROUP = 512;                 // words over which d_h is summed in the tile registers
    static constexpr int64_t CHUNK_BYTES = 64 << 20;  // of exponentials
    static constexpr float MOST_ABOVE = 60.0f;        // exp(60) times a vocabulary is far below float32's largest

    static int subs_of(int tokens) { return (tokens + SUB - 1) / SUB; }
    static int chunk_of(const Loss& t) {
        const int64_t most = std::max<int64_t>(1, CHUNK_BYTES / (int64_t(t.vocabulary) * 4 * SUB));
        return int(std::min<int64_t>(subs_of(t.tokens), most)) * SUB;
    }

    struct Softmax {  // of the tokens of a tile
        const int64_t* targets;
        int m;
        bool has_shifts;
        int by_target[TILE_TOKENS];
        float shift[TILE_TOKENS], target_logit[TILE_TOKENS];
        FloatVec largest[TILE_TOKENS], sums[TILE_TOKENS];  // without the target

        Softmax(const int64_t* targets, int m) : targets(targets), m(m), has_shifts(false) {
            for (int i = 0; i < m; i++) by_target[i] = i;
            std::sort(by_target, by_target + m, [&](int i, int j) { return targets[i] < targets[j]; });
        }
        // Makes the largest logit the shift, where it is far above. Returns whether there is such a row.
        bool raise_shifts() {
            bool is_raised = false;
            for (int i = 0; i < m; i++) {
                const float most = std::max(horizontal_max(largest[i]), target_logit[i]);
                if (most - shift[i] > MOST_ABOVE) shift[i] = most, is_raised = true;
            }
            has_shifts = true;
            return is_raised;
        }
    };

    void pack_head(int first) const {
        pack_panel_transposed(D, WORDS, t.head + int64_t(first) * D, D, forward + int64_t(first) * D);
        split_panel(D, forward + int64_t(first) * D);
        for (int j = 0; j < D; j += PANEL) {
            float* const panel = backward + int64_t(j) * V + int64_t(first) * PANEL;
            pack(WORDS, PANEL, t.head + int64_t(first) * D + j, D, panel);
            split_panel(WORDS, panel);
        }
    }

    // Tokens local..local + m of the chunk that begins at token `begin`.
    void compute_tile(int begin, int local, int m, int tokens) const {
        const int64_t first = begin + local;
        float* const rows = h + int64_t(local) * D;
        uint16_t* const h_tiles = scratch<uint16_t>(1, int64_t(TILE_TOKENS) * D * 2);
        float rstd[TILE_TOKENS];
        for (int i = 0; i < m; i++) {
            rstd[i] = inverse_rms(t.x + (first + i) * D, D, t.eps);
            normalize(t.x + (first + i) * D, t.gain, rstd[i], D, rows + int64_t(i) * D);
        }
        split_rows(m, D, {rows, D, 1}, h_tiles);
        Softmax softmax(t.targets + first, m);
        multiply_tile(softmax, first, local, tokens, h_tiles);
        if (softmax.raise_shifts()) multiply_tile(softmax, first, local, tokens, h_tiles);
        for (int i = 0; i < m; i++) {
            const float others = horizontal_sum(softmax.sums[i]);
            const float total = others + accurate_exp(softmax.target_logit[i] - softmax.shift[i]);
            const float factor = factors[first + i] = 1.0f / (total * float(M));
            const float part = target_parts[first + i] = -others * factor;
            t.losses[first + i] = std::log(total) + softmax.shift[i] - softmax.target_logit[i];
            float* const d_h = t.d_x + (first + i) * D;
            const float* const word = t.head + softmax.targets[i] * D;
#pragma omp simd
            for (int d = 0; d < D; d++) d_h[d] = d_h[d] * factor + word[d] * part;
            float* const d_gain = gain_sums + (first + i) / SUB * D;
            if (i % SUB == 0) std::fill(d_gain, d_gain + D, 0.0f);
            normalize_backward(t.x + (first + i) * D, t.gain, rstd[i], D, d_h, d_gain);
        }
    }

    // The exponentials of a tile, and their products with the head, in d_x.
    void multiply_tile(Softmax& softmax, int64_t first, int local, int tokens, const uint16_t* h_tiles) const {
        const int m = softmax.m;
        uint16_t* const p_tiles = scratch<uint16_t>(2, int64_t(TILE_TOKENS) * GROUP * 2);
        if (m % WORDS) std::fill(p_tiles, p_tiles + int64_t(TILE_TOKENS) * GROUP * 2, uint16_t(0));
        std::fill(softmax.sums, softmax.sums + m, FloatVec{});
        std::fill(softmax.largest, softmax.largest + m, broadcast(-INFINITY));
        int next = 0;  // of softmax.by_target
        for (int group = 0; group < V; group += GROUP) {
            const int size = std::min(GROUP, V - group);
            for (int word = group; word < group + size; word += WORDS) {
                int end = next;
                while (end < m && softmax.targets[softmax.by_target[end]] < word + WORDS) end++;
                for (int i = 0; i < m; i += SUB)
                    exponentiate(softmax, i, word, next, end, h_tiles + int64_t(i) * D * 2,
                                 p_tiles + int64_t(i) * size * 2 + (word - group) / 32 * 1024, size / 32,
                                 (local + i) / 32, (tokens + 31) / 32);
                next = end;
            }
            for (int j = 0; j < D; j += PANEL)
                multiply_split_panel(m, D - j, size, p_tiles, backward + int64_t(j) * V + int64_t(group) * PANEL,
                                     t.d_x + first * D + j, D, group > 0);
        }
    }

    // The exponentials of up to SUB tokens of a tile, from its token `first` on, and of the words of a panel. `next`
    // and `end` say which targets are among the words.
    void exponentiate(Softmax& softmax, int first, int word, int next, int end, const uint16_t* h_tiles,
                      uint16_t* p_tiles, int p_blocks, int token_block, int token_blocks) const {
        alignas(64) float logits[SUB * WORDS];
        const int m = std::min(SUB, softmax.m - first), padded = (m + 31) / 32 * 32;
        multiply_split_panel(m, WORDS, D, h_tiles, forward + int64_t(word) * D, logits, WORDS, false);
        if (!softmax.has_shifts && word == 0)
            for (int i = 0; i < m; i++) {
                const FloatVec x = load_floats(logits + i * WORDS), y = load_floats(logits + i * WORDS + LANES);
                softmax.shift[first + i] = horizontal_max(x > y ? x : y);
            }
        for (; next < end; next++) {
            const int i = softmax.by_target[next];
            if (i < first || i >= first + m) continue;
            float& logit = logits[(i - first) * WORDS + softmax.targets[i] - word];
            softmax.target_logit[i] = logit;
            logit = -INFINITY;
        }
        for (int i = 0; i < m; i++) {
            float* const row = logits + i * WORDS;
            const FloatVec shift = broadcast(softmax.shift[first + i]);
            FloatVec x = load_floats(row), y = load_floats(row + LANES), largest = x > y ? x : y;
            FloatVec& most = softmax.largest[first + i];
            most = largest > most ? largest : most;
            x = accurate_exp(x - shift), y = accurate_exp(y - shift);
            softmax.sums[first + i] += x + y;
            store_floats(row, x), store_floats(row + LANES, y);
            store_split(x, y, p_tiles + int64_t(i / 16) * p_blocks * 1024 + i % 16 * 32);
        }
        std::fill(logits + m * WORDS, logits + padded * WORDS, 0.0f);
        for (int i = 0; i < padded; i += 32)
            for (int half = 0; half < 2; half++)
                split_columns(logits + i * WORDS + half * 16, WORDS, 16,
                              exponentials + (int64_t(word / 16 + half) * token_blocks + token_block + i / 32) * 1024);
    }

    // d_head of words first..last, from the tokens of a chunk.
    void head_gradient(int begin, int tokens, int first, int last, const Chunks& chunks) const {
        const int blocks = (tokens + 31) / 32;
        for (int word = first; word < last; word += WORDS) {
            const uint16_t* const a = exponentials + int64_t(word / 16) * blocks * 1024;
            for (int i = 0; i < chunks.count(); i++) {
                const int depth = chunks.depth(i), at = chunks.begin(i) / 32 * 1024;
                for (int j = 0; j < D; j += PANEL)
                    multiply_tiles<true>(depth / 32, a + at, a + blocks * 1024 + at,
                                         chunks.at(inputs, i) + int64_t(j) * depth, t.d_head + int64_t(word) * D + j, D,
                                         WORDS, D - j, begin > 0 || i > 0);
            }
        }
        for (int i = 0; i < tokens; i++) {
            const int64_t target = t.targets[begin + i];
            if (target < first || target >= last) continue;
            float* const to = t.d_head + target * D;
            const float *const from = h + int64_t(i) * D, part = target_parts[begin + i];
#pragma omp simd
            for (int d = 0; d < D; d++) to[d] += from[d] * part;
        }
    }

    const Loss& t;
    const Threads threads;
    const int M, D, V, chunk;  // tokens, hidden, vocabulary; tokens whose exponentials are kept at once
    float* const forward = scratch(10, 2 * int64_t(V) * D);  // the head for h @ head.T
    float* const backward = forward + int64_t(V) * D;        // the head for p @ head
    float* const h = scratch(11, int64_t(chunk) * D);
    uint16_t* const exponentials = scratch<uint16_t>(12, int64_t(chunk) * V * 2);
    float* const inputs = scratch(13, panel_floats(chunk, D));
    float* const gain_sums = scratch(14, int64_t(subs_of(M)) * D);
    float* const factors = scratch(15, 2 * int64_t(M));  // 1 / (total M) of each token
    float* const target_parts = factors + M;
};
