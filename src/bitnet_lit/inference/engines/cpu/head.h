// The output head as int8: half of a small model's bytes, and a matrix that was not trained to be rounded.
//
// Each row has a scale of its own. Activations have 12 bits, so that the rounding of the rows is nearly the whole error; they
// are shifted to be positive and split into two halves of 6 bits, because products of unsigned and signed bytes are what
// processors have:  x ~ (64 * high + low - 2048) * step,  so  w . x ~ scale * step * (64 * w . high + w . low - 2048 * sum(w)).
// Sums of two such products still fit into the 16 bits of AVX2. Rows lie in groups of 16, four inputs of each in a block of
// 64 bytes: as in packing.h a 32-bit lane belongs to one row.
//
// The logits are close, and which token is the likeliest is exact: a logit has a margin that its error does not pass, and
// every row that could be the best by that is computed again from the weights as they were (engine.h).
#pragma once

#include "kernels.h"

constexpr int HALF_BITS = 6, HEAD_ZERO = 1 << (2 * HALF_BITS - 1);
inline int quads_of(int inputs) { return padded(inputs) / 4; }
inline size_t head_group_bytes(int inputs) { return size_t(quads_of(inputs)) * 64; }

struct HeadRows {  // of a group; a row that does not exist has scale 0
    float scale[ROWS];
    int32_t zero[ROWS];  // HEAD_ZERO times the sum of the row's codes; 32 bits may overflow, and the final sum undoes that
};

// (vocab, inputs) to groups of codes and what belongs to each.
template <class W>
inline void quantize_head(const W* weights, int vocab, int inputs, int8_t* codes, HeadRows* groups) {
    Buffer<float> row{size_t(inputs)};
    for (int r = 0; r < vocab; r++) {
        for (int i = 0; i < inputs; i++) row[i] = as_float(weights[size_t(r) * inputs + i]);
        const float scale = std::max(largest_magnitude(row, inputs), 1e-12f) / 127.0f;
        int8_t* out = codes + r / ROWS * head_group_bytes(inputs) + r % ROWS * 4;
        int32_t sum = 0;
        for (int i = 0; i < inputs; i++) {
            const int8_t code = int8_t(std::nearbyint(row[i] / scale));
            out[size_t(i / 4) * 64 + i % 4] = code, sum += code;
        }
        groups[r / ROWS].scale[r % ROWS] = scale;
        groups[r / ROWS].zero[r % ROWS] = int32_t(uint32_t(sum) * HEAD_ZERO);
    }
}

struct HeadInput {  // one token; the halves have padded(inputs) bytes
    uint8_t *high, *low;
    float step, noise;
};

// `noise` times a row's scale is the margin: six deviations of a logit from its exact value. The rounding of a row's weights
// is noise of scale / sqrt(12) at each input; that of the activations is noise of step / sqrt(12) at each weight, and those
// are at most 127 scales.
inline void quantize_head_input(const float* x, int inputs, HeadInput& to) {
    const int limit = std::min(HEAD_ZERO - 1, INT32_MAX / (127 * inputs));  // so that a whole product has 32 bits
    const float largest = std::max(largest_magnitude(x, inputs), 1e-5f), factor = float(limit) / largest;
    for (int i = 0; i < inputs; i++) {
        const int32_t code = int32_t(std::nearbyint(x[i] * factor)) + HEAD_ZERO;
        to.high[i] = uint8_t(code >> HALF_BITS), to.low[i] = uint8_t(code & ((1 << HALF_BITS) - 1));
    }
    to.step = largest / float(limit);
    to.noise = 6.0f * std::sqrt((sum_of_squares(x, inputs) + float(inputs) * 127.0f * 127.0f * to.step * to.step) / 12.0f);
}

// One group of rows times T tokens: integer products with both halves, each [token * ROWS + row].
template <int T>
ONCE void head_tile(const int8_t* w, const HeadInput* x, int quads, uint32_t* high, uint32_t* low) {
    using namespace simd;
    constexpr int PAIRS = W == 64 && T <= 2 ? 4 / T : 1;  // independent chains of additions, as in kernels.h
    Sums sums[PAIRS][T][PARTS][2];
    for (auto& pair : sums)
        for (auto& token : pair)
            for (auto& part : token) part[0] = part[1] = zero();
    for (int q = 0; q < quads; q += 2 * PAIRS)
        for (int c = 0; c < PAIRS; c++, w += 128) {
            prefetch(w + AHEAD), prefetch(w + AHEAD + 64);
            for (int t = 0; t < T; t++) {
                const uint8_t *h = x[t].high + 4 * (q + 2 * c), *l = x[t].low + 4 * (q + 2 * c);
                const Bytes h0 = four(h), h1 = four(h + 4), l0 = four(l), l1 = four(l + 4);
                for (int p = 0; p < PARTS; p++) {
                    const Bytes a = load(w + p * W), b = load(w + 64 + p * W);
                    sums[c][t][p][0] = dot_two(sums[c][t][p][0], h0, a, h1, b);
                    sums[c][t][p][1] = dot_two(sums[c][t][p][1], l0, a, l1, b);
                }
            }
        }
    for (int t = 0; t < T; t++)
        for (int p = 0; p < PARTS; p++) {
            for (int c = 1; c < PAIRS; c++)
                for (int half = 0; half < 2; half++) sums[0][t][p][half] = add(sums[0][t][p][half], sums[c][t][p][half]);
            store((int32_t*)high + t * ROWS + p * W / 4, sums[0][t][p][0]);
            store((int32_t*)low + t * ROWS + p * W / 4, sums[0][t][p][1]);
        }
}

constexpr int HEAD_TILE = simd::W == 64 ? 4 : 2;

// What a group of rows can reach: logits plus and minus their margins, the largest of each.
struct Reach { float most, least; };

// Logits of the first `count` rows of a group for all tokens, logits[token * stride + row], and their reach[token * reaches].
inline void head_logits(const int8_t* w, const HeadRows& rows, int count, const HeadInput* x, int tokens, int quads, float* logits,
                        size_t stride, Reach* reach, size_t reaches) {
    for (int t = 0; t < tokens; t += HEAD_TILE) {
        uint32_t high[HEAD_TILE * ROWS], low[HEAD_TILE * ROWS];
        const int now = std::min(HEAD_TILE, tokens - t);
        if (now == HEAD_TILE) head_tile<HEAD_TILE>(w, x + t, quads, high, low);
        else for (int i = 0; i < now; i++) head_tile<1>(w, x + t + i, quads, high + i * ROWS, low + i * ROWS);
        for (int i = 0; i < now; i++) {
            const HeadInput& in = x[t + i];
            float values[ROWS], most = -INFINITY, least = -INFINITY;
            for (int r = 0; r < ROWS; r++) {
                const uint32_t product = (high[i * ROWS + r] << HALF_BITS) + low[i * ROWS + r] - uint32_t(rows.zero[r]);
                values[r] = float(int32_t(product)) * (in.step * rows.scale[r]);
            }
            for (int r = count; r < ROWS; r++) values[r] = -INFINITY;
#pragma omp simd reduction(max : most, least)
            for (int r = 0; r < ROWS; r++) {
                most = std::max(most, values[r] + in.noise * rows.scale[r]);
                least = std::max(least, values[r] - in.noise * rows.scale[r]);
            }
            std::memcpy(logits + (t + i) * stride, values, size_t(count) * sizeof(float));
            reach[(t + i) * reaches] = {most, least};
        }
    }
}
