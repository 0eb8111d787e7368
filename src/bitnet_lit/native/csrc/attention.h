// Causal attention with rotary positions and grouped queries, and its gradients.
//
//     q, k = rotary(q), rotary(k); scores = q @ k.T / sqrt(P), masked; p = softmax(scores); y = p @ v
//     dv += p.T @ dy;  ds = p * (dy @ v.T - rowsum(dy * y)) / sqrt(P);  dq = ds @ k;  dk += ds.T @ q
//
// A task is one head of one sequence; in the backward pass, all heads that share keys. The scores of a block of queries
// are kept at once, never those of a whole sequence; the backward pass computes them again from the logarithm of their
// sum.
//
// Letters: B batch, T time, H heads, K key/value heads, P head_dim.
#pragma once

#include "matmul.h"
#include "parallel.h"
#include "rows.h"

struct Attention {
    int32_t batch, length, heads, kv_heads, head_dim, threads;
    int64_t row, d_row;  // floats from a token's q, k or v to the next token's, and the same of their gradients
    Fork fork;
    const float *q, *k, *v, *cos, *sin;  // cos and sin: (T, P)
    float *y, *log_sum;                  // (B, T, H * P); (B, H, T)
    const float* d_y;
    float *d_q, *d_k, *d_v;
};

class HeadTask {
   public:
    HeadTask(const Attention& a, int64_t sequence, int kv_head)
        : a(a),
          T(a.length),
          P(a.head_dim),
          stride(panels_of(T) * PANEL),
          scale(1.0f / std::sqrt(float(P))),
          tokens(sequence * T),
          sequence(sequence),
          kv_head(kv_head),
          keys(scratch(0, int64_t(T) * P)),
          queries(scratch(1, int64_t(T) * P)),
          key_columns(scratch(2, panel_floats(P, T))),
          value_panels(scratch(3, std::max(panel_floats(P, T), panel_floats(T, P)))),
          scores(scratch(4, int64_t(BLOCK) * stride)) {
        rotate_all(a.k + at_kv(), keys);
        pack_transposed(P, T, keys, P, key_columns);
    }

    void forward(int head) {
        pack(T, P, a.v + at_kv(), a.row, value_panels);
        rotate_all(a.q + tokens * a.row + head * P, queries);
        float* const log_sum = a.log_sum + (sequence * a.heads + head) * T;
        const int64_t y_row = int64_t(a.heads) * P;
        float* const y = a.y + tokens * y_row + head * P;
        for (int first = 0; first < T; first += BLOCK) {
            const int m = std::min(BLOCK, T - first), seen = first + m;
            multiply_seen(first, m, queries + int64_t(first) * P, P, key_columns, scores);
            float inverse[BLOCK];
            for (int i = 0; i < m; i++) {
                float* const s = scores + i * stride;
                const int mine = first + i + 1, padded = (mine + LANES - 1) / LANES * LANES;
                std::fill(s + mine, s + padded, -INFINITY);
                FloatVec largest = load_floats(s), sum{};
                for (int j = LANES; j < padded; j += LANES) {
                    const FloatVec x = load_floats(s + j);
                    largest = x > largest ? x : largest;
                }
                const float most = horizontal_max(largest);
                for (int j = 0; j < padded; j += LANES) {
                    const FloatVec p = accurate_exp((load_floats(s + j) - most) * scale);
                    store_floats(s + j, p);
                    sum += p;
                }
                std::fill(s + mine, s + std::max(padded, seen), 0.0f);
                const float total = horizontal_sum(sum);
                inverse[i] = 1.0f / total;
                log_sum[first + i] = most * scale + std::log(total);
            }
            float* const block = y + first * y_row;
            multiply_keys(first, m, value_panels, block, y_row, scores);
            for (int i = 0; i < m; i++)
#pragma omp simd
                for (int p = 0; p < P; p++) block[i * y_row + p] *= inverse[i];
        }
    }

    // The gradients of all heads that share the keys of kv_head.
    void backward() {
        const int group = a.heads / a.kv_heads;
        const int64_t y_row = int64_t(a.heads) * P;
        float* const d_scores = scratch(5, int64_t(BLOCK) * stride);
        float* const key_panels = scratch(6, panel_floats(T, P));
        float* const query_panels = scratch(7, panel_floats(BLOCK, P));
        float* const d_y_panels = scratch(8, panel_floats(BLOCK, P));
        float* const d_keys = scratch(9, 2 * int64_t(T) * P);
        float* const d_values = d_keys + int64_t(T) * P;
        std::fill(d_keys, d_keys + 2 * int64_t(T) * P, 0.0f);
        pack_transposed(P, T, a.v + at_kv(), a.row, value_panels);
        pack(T, P, keys, P, key_panels);
        for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
            rotate_all(a.q + tokens * a.row + head * P, queries);
            const float* const log_sum = a.log_sum + (sequence * a.heads + head) * T;
            float* const d_q = a.d_q + tokens * a.d_row + head * P;
            for (int first = 0; first < T; first += BLOCK) {
                const int m = std::min(BLOCK, T - first), seen = first + m;
                multiply_seen(first, m, queries + int64_t(first) * P, P, key_columns, scores);
                const float* const y = a.y + (tokens + first) * y_row + head * P;
                const float* const d_y = a.d_y + (tokens + first) * y_row + head * P;
                multiply_seen(first, m, d_y, y_row, value_panels, d_scores);
                for (int i = 0; i < m; i++) {
                    float *const p = scores + i * stride, *const d = d_scores + i * stride;
                    const int mine = first + i + 1;
                    const float delta = dot_product(d_y + i * y_row, y + i * y_row, P);
                    for (int j = 0; j < mine; j += LANES) {  // the rows have room for whole vectors
                        const FloatVec x = accurate_exp(load_floats(p + j) * scale - log_sum[first + i]);
                        store_floats(p + j, x);
                        store_floats(d + j, x * (load_floats(d + j) - delta) * scale);
                    }
                    std::fill(p + mine, p + std::max(seen, (mine + LANES - 1) / LANES * LANES), 0.0f);
                    std::fill(d + mine, d + std::max(seen, (mine + LANES - 1) / LANES * LANES), 0.0f);
                }
                pack(m, P, queries + int64_t(first) * P, P, query_panels);
                pack(m, P, d_y, y_row, d_y_panels);
                multiply_keys(first, m, key_panels, d_q + first * a.d_row, a.d_row, d_scores);
                add_queries(first, m, query_panels, d_keys, d_scores);
                add_queries(first, m, d_y_panels, d_values, scores);
            }
            for (int64_t t = 0; t < T; t++) {
                float* const row = d_q + t * a.d_row;
                rotate(row, a.cos + t * P, a.sin + t * P, P, true, row);
            }
        }
        for (int64_t t = 0; t < T; t++) {
            rotate(d_keys + t * P, a.cos + t * P, a.sin + t * P, P, true, a.d_k + d_at_kv() + t * a.d_row);
            std::copy(d_values + t * P, d_values + (t + 1) * P, a.d_v + d_at_kv() + t * a.d_row);
        }
    }

   private:
    static constexpr int BLOCK = LANES == 16 ? 64 : 4 * ROWS;  // queries

    int64_t at_kv() const { return tokens * a.row + kv_head * P; }
    int64_t d_at_kv() const { return tokens * a.d_row + kv_head * P; }
    void rotate_all(const float* from, float* to) const {
        for (int64_t t = 0; t < T; t++) {
            prefetch_row(from + std::min<int64_t>(t + 24, T - 1) * a.row, P);
            rotate(from + t * a.row, a.cos + t * P, a.sin + t * P, P, false, to + t * P);
        }
    }
    // The next three are products of queries first..first + m and keys, where a query sees the keys up to its own. ROWS
    // queries, or keys, are taken at once, with all that one of them needs.
    //
    // c (m, T) = rows (m, P) of the queries @ the columns of their keys.
    void multiply_seen(int first, int m, const float* rows, int64_t row, const float* columns, float* c) const {
        for (int i = 0; i < m; i += ROWS) {
            const int count = std::min(ROWS, m - i), seen = panels_of(first + i + count) * PANEL;
            multiply(count, seen, P, {rows + i * row, row, 1}, columns, c + i * stride, stride, false);
        }
    }
    // c (m, P) = weights (m, T) of the queries @ the rows of their keys, which are packed.
    void multiply_keys(int first, int m, const float* panels, float* c, int64_t ldc, const float* weights) const {
        for (int i = 0; i < m; i += ROWS) {
            const int count = std::min(ROWS, m - i), seen = first + i + count;
            for (int j = 0; j < P; j += PANEL)
                for (int p = 0; p < seen; p += DEPTH)
                    multiply_panel(count, P - j, std::min(DEPTH, seen - p), {weights + i * stride + p, stride, 1},
                                   panels + int64_t(j) * T + p * PANEL, c + i * ldc + j, ldc, p > 0);
        }
    }
    // c (T, P) += the transpose of weights (m, T) @ m rows of the queries, which are packed.
    void add_queries(int first, int m, const float* panels, float* c, const float* weights) const {
        for (int key = 0; key < first + m; key += ROWS) {
            const int count = std::min(ROWS, first + m - key), i = std::max(0, key - first);
            for (int j = 0; j < P; j += PANEL)
                multiply_panel(count, P - j, m - i, {weights + i * stride + key, 1, stride},
                               panels + int64_t(j) * m + i * PANEL, c + int64_t(key) * P + j, P, true);
        }
    }

    const Attention& a;
    const int T, P;
    const int64_t stride;  // of a row of scores
    const float scale;
    const int64_t tokens, sequence;
    const int kv_head;
    float *const keys, *const queries, *const key_columns, *const value_panels, *const scores;
};

inline void attention_forward(const Attention& a) {
    parallel_for({a.fork, a.threads}, int64_t(a.batch) * a.heads, [&](int64_t i) {
        const int head = int(i % a.heads);
        HeadTask(a, i / a.heads, head / (a.heads / a.kv_heads)).forward(head);
    });
}

inline void attention_backward(const Attention& a) {
    parallel_for({a.fork, a.threads}, int64_t(a.batch) * a.kv_heads,
                 [&](int64_t i) { HeadTask(a, i / a.kv_heads, int(i % a.kv_heads)).backward(); });
}
