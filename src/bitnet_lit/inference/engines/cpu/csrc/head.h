// The output head in integers: half of a small model's bytes, and a matrix that was not trained to be rounded.
//
// Rows are rounded to 8 or to 4 bits with a scale each, activations so finely that the rounding of the rows is nearly
// the whole error. The logits are close; which token is the likeliest is that of the weights as they were: every row
// that could be the best within six standard deviations of the error is computed again from them (logits.h). With 4
// bits the best rows besides, about a twelfth, are computed again from 8 bits: what stays coarse are unlikely tokens.
//
// Rows lie in groups of 16, four inputs of each in a quad of 64 bytes (of 8 bits), so that a 32-bit lane belongs to one
// row. Of products, processors have those of unsigned and signed bytes.
//
//   8 bits  Activations have 12 bits, are shifted to be positive and split in two halves of 6:  x ~ (64 * high + low -
//   2048)
//           * step,  so  w . x ~ scale * step * (64 * w . high + w . low - 2048 * sum(w)).  Sums of two products of
//           such halves fit into the 16 bits of AVX2.
//   4 bits  Codes are stored as code + 8, an even quad in the low half of a byte and the odd one after it in the high
//   half;
//           activations are int8:  w . x ~ scale * step * ((code + 8) . x - 8 * sum(x)).  The 8-bit rows lie one after
//           the other, because only some are read, and activations have 12 bits for them.
#pragma once

#include "floats.h"
#include "simd.h"

constexpr int HEAD_GROUP = 16, HALF_BITS = 6, HEAD_ZERO = 1 << (2 * HALF_BITS - 1);
template <int BITS>
constexpr int LARGEST_CODE = (1 << (BITS - 1)) - 1;

inline int head_groups_of(int vocab) { return (vocab + HEAD_GROUP - 1) / HEAD_GROUP; }
inline int quads_of(int inputs) { return padded(inputs) / 4; }
template <int BITS>
inline size_t head_group_bytes(int inputs) {
    return size_t(quads_of(inputs)) * 64 * BITS / 8;
}

struct HeadRows {  // of a group; a row that does not exist has scale 0
    float scale[HEAD_GROUP];
    int32_t zero[HEAD_GROUP];  // 8 bits: HEAD_ZERO times the sum of the codes; 32 bits may overflow, and the final sum
                               // undoes that
};

// (vocab, inputs) to groups of codes (zeros before) and what belongs to each; for 4 bits also to 8-bit rows of
// padded(inputs).
template <int BITS, class W>
inline void quantize_head(const W* weights, int vocab, int inputs, uint8_t* codes, HeadRows* groups, int8_t* fine) {
    Buffer<float> row{size_t(inputs)};
    for (int r = 0; r < vocab; r++) {
        for (int i = 0; i < inputs; i++) row[i] = as_float(weights[size_t(r) * inputs + i]);
        const float largest = std::max(largest_magnitude(row, inputs), 1e-12f),
                    scale = largest / float(LARGEST_CODE<BITS>);
        if constexpr (BITS == 4)
            for (int i = 0; i < inputs; i++)
                fine[size_t(r) * padded(inputs) + i] = int8_t(code_of(row[i] * (127.0f / largest), 127.0f));
        uint8_t* out = codes + r / HEAD_GROUP * head_group_bytes<BITS>(inputs) + r % HEAD_GROUP * 4;
        int32_t sum = 0;
        for (int i = 0; i < inputs; i++) {
            const int32_t code = code_of(row[i] / scale, float(LARGEST_CODE<BITS>)), quad = i / 4;
            if constexpr (BITS == 8) out[quad * 64 + i % 4] = uint8_t(code);
            else out[quad / 2 * 64 + i % 4] |= uint8_t((code + 8) << quad % 2 * 4);
            sum += code;
        }
        groups[r / HEAD_GROUP].scale[r % HEAD_GROUP] = scale;
        groups[r / HEAD_GROUP].zero[r % HEAD_GROUP] = BITS == 8 ? int32_t(uint32_t(sum) * HEAD_ZERO) : 0;
    }
}

struct HeadInput {        // one token; each has room for padded(inputs)
    uint8_t *high, *low;  // 8 bits: the halves. 4 bits: the first holds int8 activations,
    int32_t zero;         // of which this is eight times the sum
    float step, noise;
    int16_t* fine;  // 4 bits: activations of 12 bits, times fine_step
    float fine_step;
};

// `noise` times a row's scale is the margin: six deviations of a logit from its exact value. The rounding of a row's
// weights is noise of scale / sqrt(12) at each input; that of the activations is noise of step / sqrt(12) at each
// weight, and those are at most LARGEST_CODE scales.
template <int BITS>
inline void quantize_head_input(const float* x, int inputs, HeadInput& to) {
    const int fine_limit = std::min(HEAD_ZERO - 1, INT32_MAX / (127 * inputs));  // so that a whole product has 32 bits
    const int limit = BITS == 8 ? fine_limit : 127;
    const float largest = std::max(largest_magnitude(x, inputs), 1e-5f), factor = float(limit) / largest;
    int32_t sum = 0;
    for (int i = 0; i < inputs; i++) {
        const int32_t code = code_of(x[i] * factor, float(limit)), shifted = code + HEAD_ZERO;
        if constexpr (BITS == 8)
            to.high[i] = uint8_t(shifted >> HALF_BITS), to.low[i] = uint8_t(shifted & ((1 << HALF_BITS) - 1));
        else to.high[i] = uint8_t(code), sum += code;
    }
    if constexpr (BITS == 4)
        for (int i = 0; i < inputs; i++)
            to.fine[i] = int16_t(code_of(x[i] * (float(fine_limit) / largest), float(fine_limit)));
    to.zero = 8 * sum, to.step = largest / float(limit), to.fine_step = largest / float(fine_limit);
    const float widest = float(LARGEST_CODE<BITS>) * to.step;
    to.noise = 6.0f * std::sqrt((sum_of_squares(x, inputs) + float(inputs) * widest * widest) / 12.0f);
}

// One group of rows times T tokens, 32 bits: the product without zeros, [token * HEAD_GROUP + row].
template <int T>
ONCE void head_products_8(const uint8_t* w, const HeadInput* x, int quads, uint32_t* out) {
    using namespace simd;
    constexpr int PAIRS = W == 64 && T <= 2 ? 4 / T : 1;  // independent chains of additions, as in pairs.h
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
    for (int t = 0; t < T; t++) {
        uint32_t halves[2][HEAD_GROUP];
        for (int half = 0; half < 2; half++)
            for (int p = 0; p < PARTS; p++) {
                for (int c = 1; c < PAIRS; c++) sums[0][t][p][half] = add(sums[0][t][p][half], sums[c][t][p][half]);
                store((int32_t*)halves[half] + p * W / 4, sums[0][t][p][half]);
            }
        for (int r = 0; r < HEAD_GROUP; r++) out[t * HEAD_GROUP + r] = (halves[0][r] << HALF_BITS) + halves[1][r];
    }
}

template <int T>
ONCE void head_products_4(const uint8_t* w, const HeadInput* x, int quads, uint32_t* out) {
    using namespace simd;
    constexpr int CHAINS = W == 64 && T <= 2 ? 4 / T : 1;
    Sums sums[T][PARTS];
    for (auto& token : sums)
        for (auto& sum : token) sum = zero();
    for (int q = 0; q < quads;) {
        Partial acc[CHAINS][T][PARTS][2];
        for (auto& chain : acc)
            for (auto& token : chain)
                for (auto& part : token) part[0] = part[1] = zero();
        const int end = std::min(quads, q + 2 * NIBBLE_RUN);
        for (; q < end; q += 2 * CHAINS)
            for (int c = 0; c < CHAINS; c++, w += 64) {
                prefetch(w + AHEAD);
                for (int p = 0; p < PARTS; p++) {
                    const Bytes v = load(w + p * W), low = low_nibbles(v), high = high_nibbles(v);
                    for (int t = 0; t < T; t++) {
                        const uint8_t* in = x[t].high + 4 * (q + 2 * c);
                        acc[c][t][p][0] = dot(acc[c][t][p][0], low, four(in));
                        acc[c][t][p][1] = dot(acc[c][t][p][1], high, four(in + 4));
                    }
                }
            }
        for (auto& chain : acc)
            for (int t = 0; t < T; t++)
                for (int p = 0; p < PARTS; p++)
                    for (auto& a : chain[t][p]) sums[t][p] = add(sums[t][p], widen(a));
    }
    for (int t = 0; t < T; t++)
        for (int p = 0; p < PARTS; p++) store((int32_t*)out + t * HEAD_GROUP + p * W / 4, sums[t][p]);
}

// A row of 8 bits times activations of 12.
ONCE inline int32_t fine_product(const int8_t* w, const int16_t* x, int inputs) {
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < inputs; i++) sum += int32_t(w[i]) * x[i];
    return sum;
}

template <int BITS, int T>
inline void head_products(const uint8_t* w, const HeadInput* x, int quads, uint32_t* out) {
    if constexpr (BITS == 8) head_products_8<T>(w, x, quads, out);
    else head_products_4<T>(w, x, quads, out);
}

constexpr int FINE_AHEAD = 6;  // rows of 8 bits that are asked for before they are needed
constexpr int HEAD_TILE = simd::W == 64 ? 4 : 2;

struct Reach {
    float best, most, least;
};  // of a group: its largest logit, and the largest with margin added and taken off

// Logits of the first `count` rows of a group for all tokens, logits[token * stride + row], and their reach[token *
// reaches].
template <int BITS>
inline void head_logits(const uint8_t* w, const HeadRows& rows, int count, const HeadInput* x, int tokens, int quads,
                        float* logits, size_t stride, Reach* reach, size_t reaches) {
    for (int t = 0; t < tokens; t += HEAD_TILE) {
        uint32_t products[HEAD_TILE * HEAD_GROUP];
        const int now = std::min(HEAD_TILE, tokens - t);
        if (now == HEAD_TILE) head_products<BITS, HEAD_TILE>(w, x + t, quads, products);
        else
            for (int i = 0; i < now; i++) head_products<BITS, 1>(w, x + t + i, quads, products + i * HEAD_GROUP);
        for (int i = 0; i < now; i++) {
            const HeadInput& in = x[t + i];
            float values[HEAD_GROUP], best = -INFINITY, most = -INFINITY, least = -INFINITY;
            for (int r = 0; r < HEAD_GROUP; r++) {
                const uint32_t zero = BITS == 8 ? uint32_t(rows.zero[r]) : uint32_t(in.zero);
                values[r] = float(int32_t(products[i * HEAD_GROUP + r] - zero)) * (in.step * rows.scale[r]);
            }
            for (int r = count; r < HEAD_GROUP; r++) values[r] = -INFINITY;
#pragma omp simd reduction(max : best, most, least)
            for (int r = 0; r < HEAD_GROUP; r++) {
                best = std::max(best, values[r]);
                most = std::max(most, values[r] + in.noise * rows.scale[r]);
                least = std::max(least, values[r] - in.noise * rows.scale[r]);
            }
            std::memcpy(logits + (t + i) * stride, values, size_t(count) * sizeof(float));
            reach[(t + i) * reaches] = {best, most, least};
        }
    }
}
