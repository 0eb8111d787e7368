// Attention of queries over one lane of a cache: softmax(query . keys / sqrt(P)) . values.
//
// Several queries that see the same keys (heads of a group, neighbours in a prompt) are taken together, so that each
// key and value is loaded once for all of them. The sums of a query do not depend on who is with it.
#pragma once

#include "cache.h"

struct Query {
    const float* at;  // (head_dim), rotated
    float* out;       // (head_dim)
    int length;       // it sees positions [0, length)
};

constexpr int QUERIES = 4;  // at once
constexpr int VECTORS = 8;  // of scores or of results in the making, over all queries: as many as registers are free

// Scores of V vectors of positions from `keys` on, scores[query * stride + position].
template <class E, int Q, int V>
inline void score(const E* keys, int p, const Query* queries, float scale, float* scores, size_t stride) {
    Floats sums[Q][V]{};
    for (int i = 0; i < p; i++) {
        Floats key[V];
        for (int v = 0; v < V; v++) key[v] = load_floats(keys + (size_t(v) * p + i) * LANES);
        for (int q = 0; q < Q; q++) {
            const Floats x = all(queries[q].at[i]);
            for (int v = 0; v < V; v++) sums[q][v] = fused(x, key[v], sums[q][v]);
        }
    }
    for (int q = 0; q < Q; q++)
        for (int v = 0; v < V; v++) store_floats(scores + q * stride + v * LANES, sums[q][v] * scale);
}

// V vectors of each result: sums of scores[query * stride + position] * values[position].
template <class E, int Q, int V>
inline void mix(const E* values, int width, int n, const float* scores, size_t stride, const float* totals,
                Query* queries, int at, int p) {
    Floats sums[Q][V]{};
    for (int j = 0; j < n; j++, values += width) {
        Floats value[V];
        for (int v = 0; v < V; v++) value[v] = load_floats(values + v * LANES);
        for (int q = 0; q < Q; q++) {
            const Floats weight = all(scores[q * stride + j]);
            for (int v = 0; v < V; v++) sums[q][v] = fused(weight, value[v], sums[q][v]);
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

// exp(scores - largest) of the first n, zero from there to `end`; returns their sum, NaN where a score is no number.
ONCE inline float soften(float* scores, int n, int end) {
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

// Loops over vectors, V at a time, then half of that, ...
template <class E, int Q, int V = VECTORS / Q>
inline void score_from(int j, int whole, const E* keys, int p, const Query* queries, float scale, float* scores,
                       size_t stride) {
    for (; j + V * LANES <= whole; j += V * LANES)
        score<E, Q, V>(keys + size_t(j) * p, p, queries, scale, scores + j, stride);
    if constexpr (V > 1) score_from<E, Q, V / 2>(j, whole, keys, p, queries, scale, scores, stride);
}
template <class E, int Q, int V = VECTORS / Q>
inline void mix_from(int at, int width, const E* values, int n, const float* scores, size_t stride, const float* totals,
                     Query* queries, int p) {
    for (; at + V * LANES <= width; at += V * LANES)
        mix<E, Q, V>(values + at, width, n, scores, stride, totals, queries, at, p);
    if constexpr (V > 1) mix_from<E, Q, V / 2>(at, width, values, n, scores, stride, totals, queries, p);
}

template <class E, int Q>
inline void attend_together(const Cache& c, const CacheShape& s, int lane, Query* queries, float* scores,
                            size_t stride) {
    const int p = s.head_dim;
    int longest = 0;
    for (int q = 0; q < Q; q++) longest = std::max(longest, queries[q].length);
    const size_t row = size_t(lane) * c.room;
    score_from<E, Q>(0, round_up(longest, LANES), (const E*)c.keys->data + row * p, p, queries,
                     1.0f / std::sqrt(float(p)), scores, stride);
    float totals[Q];
    for (int q = 0; q < Q; q++) {
        float* mine = scores + q * stride;
        if (s.scaled())
            for (int j = 0; j < longest; j++) mine[j] *= (*c.key_scales)[row + j];
        totals[q] = soften(mine, queries[q].length, longest);
        if (s.scaled())
            for (int j = 0; j < longest; j++) mine[j] *= (*c.value_scales)[row + j];
    }
    mix_from<E, Q>(0, s.width(), (const E*)c.values->data + row * s.width(), longest, scores, stride, totals, queries,
                   p);
}

// `scores` has room for QUERIES times `stride` floats, stride being the longest length rounded up to LANES or more.
template <class E>
inline void attend(const Cache& c, const CacheShape& s, int lane, Query* queries, int count, float* scores,
                   size_t stride) {
    int q = 0;
    for (; q + QUERIES <= count; q += QUERIES) attend_together<E, QUERIES>(c, s, lane, queries + q, scores, stride);
    for (; q < count; q++) attend_together<E, 1>(c, s, lane, queries + q, scores, stride);
}
