// Causal attention of queries over one key/value head: softmax(q . k / sqrt(head_dim)) . v.
//
// Several queries that see the same keys (the heads of a group, neighbours in a prompt) are computed together, so that
// each key and value is loaded once for all of them. The sums of a query do not depend on which queries it is computed
// with.
#pragma once

#include "kv_cache.h"

struct Query {
    const float* q;  // (head_dim), rotated
    float* out;      // (head_dim)
    int length;      // it sees positions [0, length)
};

constexpr int TILE_QUERIES = 4;  // computed together
constexpr int TILE_VECTORS = 8;  // accumulators over all queries of a tile: as many as there are free registers

// Scores of V vectors of positions from `keys` on: scores[query * stride + position].
template <class E, int Q, int V>
inline void qk_dot(const E* keys, int p, const Query* queries, float scale, float* scores, size_t stride) {
    FloatVec sums[Q][V]{};
    for (int i = 0; i < p; i++) {
        FloatVec key[V];
        for (int v = 0; v < V; v++) key[v] = load_floats(keys + (size_t(v) * p + i) * LANES);
        for (int q = 0; q < Q; q++) {
            const FloatVec x = broadcast(queries[q].q[i]);
            for (int v = 0; v < V; v++) sums[q][v] = fmadd(x, key[v], sums[q][v]);
        }
    }
    for (int q = 0; q < Q; q++)
        for (int v = 0; v < V; v++) store_floats(scores + q * stride + v * LANES, sums[q][v] * scale);
}

// V vectors of each output from element `at` on: sums of scores[query * stride + position] * values[position], divided
// by the query's total.
template <class E, int Q, int V>
inline void weighted_sum(const E* values, int width, int n, const float* scores, size_t stride, const float* totals,
                         Query* queries, int at, int p) {
    FloatVec sums[Q][V]{};
    for (int j = 0; j < n; j++, values += width) {
        FloatVec value[V];
        for (int v = 0; v < V; v++) value[v] = load_floats(values + v * LANES);
        for (int q = 0; q < Q; q++) {
            const FloatVec weight = broadcast(scores[q * stride + j]);
            for (int v = 0; v < V; v++) sums[q][v] = fmadd(weight, value[v], sums[q][v]);
        }
    }
    for (int q = 0; q < Q; q++)
        for (int v = 0; v < V && at + v * LANES < p; v++) {
            float part[LANES];
            store_floats(part, sums[q][v] / totals[q]);
            std::memcpy(queries[q].out + at + v * LANES, part,
                        size_t(std::min(LANES, p - at - v * LANES)) * sizeof(float));
        }
}

// The softmax without its division: exp(score - largest) of the first n scores and zeros from there to `end`. Returns
// the sum, NaN where a score is NaN or infinite.
NOINLINE inline float softmax_exp(float* scores, int n, int end) {
    float largest = -INFINITY, total = 0, differences = 0;
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < n; j++) largest = std::max(largest, scores[j]);
#pragma omp simd reduction(+ : total, differences)
    for (int j = 0; j < n; j++) {
        const float difference = scores[j] - largest;
        scores[j] = fast_exp(difference);
        total += scores[j], differences += difference;
    }
    std::fill(scores + n, scores + end, 0.0f);
    return std::isnan(differences) ? differences : total;
}

// qk_dot of all positions, and weighted_sum of all elements: V vectors at a time, then V / 2, ...
template <class E, int Q, int V = TILE_VECTORS / Q>
inline void all_scores(int j, int end, const E* keys, int p, const Query* queries, float scale, float* scores,
                       size_t stride) {
    for (; j + V * LANES <= end; j += V * LANES)
        qk_dot<E, Q, V>(keys + size_t(j) * p, p, queries, scale, scores + j, stride);
    if constexpr (V > 1) all_scores<E, Q, V / 2>(j, end, keys, p, queries, scale, scores, stride);
}
template <class E, int Q, int V = TILE_VECTORS / Q>
inline void all_outputs(int at, int width, const E* values, int n, const float* scores, size_t stride,
                        const float* totals, Query* queries, int p) {
    for (; at + V * LANES <= width; at += V * LANES)
        weighted_sum<E, Q, V>(values + at, width, n, scores, stride, totals, queries, at, p);
    if constexpr (V > 1) all_outputs<E, Q, V / 2>(at, width, values, n, scores, stride, totals, queries, p);
}

template <class E, int Q>
inline void attend_tile(const Cache& c, const CacheShape& s, int head, Query* queries, float* scores, size_t stride) {
    const int p = s.head_dim;
    int longest = 0;
    for (int q = 0; q < Q; q++) longest = std::max(longest, queries[q].length);
    const size_t row = size_t(head) * c.room;
    all_scores<E, Q>(0, round_up(longest, LANES), (const E*)c.keys->data + row * p, p, queries,
                     1.0f / std::sqrt(float(p)), scores, stride);
    float totals[Q];
    for (int q = 0; q < Q; q++) {
        float* mine = scores + q * stride;
        if (s.scaled())
            for (int j = 0; j < longest; j++) mine[j] *= (*c.key_scales)[row + j];
        totals[q] = softmax_exp(mine, queries[q].length, longest);
        if (s.scaled())
            for (int j = 0; j < longest; j++) mine[j] *= (*c.value_scales)[row + j];
    }
    all_outputs<E, Q>(0, s.width(), (const E*)c.values->data + row * s.width(), longest, scores, stride, totals,
                      queries, p);
}

// `scores` has room for TILE_QUERIES * stride floats; stride is the longest length, rounded up to LANES, or more.
template <class E>
inline void attend(const Cache& c, const CacheShape& s, int head, Query* queries, int count, float* scores,
                   size_t stride) {
    int q = 0;
    for (; q + TILE_QUERIES <= count; q += TILE_QUERIES)
        attend_tile<E, TILE_QUERIES>(c, s, head, queries + q, scores, stride);
    for (; q < count; q++) attend_tile<E, 1>(c, s, head, queries + q, scores, stride);
}
