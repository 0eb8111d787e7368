// Products of the integer output head (lm_head_quantize.h): one panel of 16 rows with a few tokens, and their logits.
#pragma once

#include "lm_head_quantize.h"
#include "simd.h"

// Rows of 8 bits times T tokens: 64 * w . high + w . low, modulo 2**32, to out[token * HEAD_PANEL_ROWS + row]. The zero
// point is not subtracted yet.
template <int T>
NOINLINE void head_products_8(const uint8_t* w, const HeadInput* x, int quads, uint32_t* out) {
    using namespace simd;
    constexpr int CHAINS = WIDTH == 64 && T <= 2 ? 4 / T : 1;  // accumulators that do not wait for each other
    Int32Vec sums[CHAINS][T][VECTORS_PER_LINE][2];
    for (auto& chain : sums)
        for (auto& token : chain)
            for (auto& part : token) part[0] = part[1] = zero();
    for (int q = 0; q < quads; q += 2 * CHAINS)
        for (int c = 0; c < CHAINS; c++, w += 128) {
            prefetch(w + PREFETCH_BYTES), prefetch(w + PREFETCH_BYTES + 64);
            for (int t = 0; t < T; t++) {
                const uint8_t *h = x[t].high + 4 * (q + 2 * c), *l = x[t].low + 4 * (q + 2 * c);
                const ByteVec h0 = broadcast_4(h), h1 = broadcast_4(h + 4);
                const ByteVec l0 = broadcast_4(l), l1 = broadcast_4(l + 4);
                for (int p = 0; p < VECTORS_PER_LINE; p++) {
                    const ByteVec a = load(w + p * WIDTH), b = load(w + 64 + p * WIDTH);
                    sums[c][t][p][0] = dot_two(sums[c][t][p][0], h0, a, h1, b);
                    sums[c][t][p][1] = dot_two(sums[c][t][p][1], l0, a, l1, b);
                }
            }
        }
    for (int t = 0; t < T; t++) {
        uint32_t halves[2][HEAD_PANEL_ROWS];
        for (int half = 0; half < 2; half++)
            for (int p = 0; p < VECTORS_PER_LINE; p++) {
                for (int c = 1; c < CHAINS; c++) sums[0][t][p][half] = add(sums[0][t][p][half], sums[c][t][p][half]);
                store((int32_t*)halves[half] + p * WIDTH / 4, sums[0][t][p][half]);
            }
        for (int r = 0; r < HEAD_PANEL_ROWS; r++)
            out[t * HEAD_PANEL_ROWS + r] = (halves[0][r] << HALF_BITS) + halves[1][r];
    }
}

// Rows of 4 bits times T tokens: (code + 8) . x to out[token * HEAD_PANEL_ROWS + row].
template <int T>
NOINLINE void head_products_4(const uint8_t* w, const HeadInput* x, int quads, uint32_t* out) {
    using namespace simd;
    constexpr int CHAINS = WIDTH == 64 && T <= 2 ? 4 / T : 1;
    Int32Vec sums[T][VECTORS_PER_LINE];
    for (auto& token : sums)
        for (auto& sum : token) sum = zero();
    for (int q = 0; q < quads;) {
        PartialSum acc[CHAINS][T][VECTORS_PER_LINE][2];
        for (auto& chain : acc)
            for (auto& token : chain)
                for (auto& part : token) part[0] = part[1] = zero();
        const int end = std::min(quads, q + 2 * MAX_PARTIAL_TERMS);
        for (; q < end; q += 2 * CHAINS)
            for (int c = 0; c < CHAINS; c++, w += 64) {
                prefetch(w + PREFETCH_BYTES);
                for (int p = 0; p < VECTORS_PER_LINE; p++) {
                    const ByteVec v = load(w + p * WIDTH), low = low_nibbles(v), high = high_nibbles(v);
                    for (int t = 0; t < T; t++) {
                        const uint8_t* in = x[t].high + 4 * (q + 2 * c);
                        acc[c][t][p][0] = dot(acc[c][t][p][0], low, broadcast_4(in));
                        acc[c][t][p][1] = dot(acc[c][t][p][1], high, broadcast_4(in + 4));
                    }
                }
            }
        for (auto& chain : acc)
            for (int t = 0; t < T; t++)
                for (int p = 0; p < VECTORS_PER_LINE; p++)
                    for (auto& a : chain[t][p]) sums[t][p] = add(sums[t][p], widen(a));
    }
    for (int t = 0; t < T; t++)
        for (int p = 0; p < VECTORS_PER_LINE; p++)
            store((int32_t*)out + t * HEAD_PANEL_ROWS + p * WIDTH / 4, sums[t][p]);
}

template <int BITS, int T>
inline void head_products(const uint8_t* w, const HeadInput* x, int quads, uint32_t* out) {
    if constexpr (BITS == 8) head_products_8<T>(w, x, quads, out);
    else head_products_4<T>(w, x, quads, out);
}

// One int8 row times one token's int12 activations.
NOINLINE inline int32_t int8_int12_dot(const int8_t* w, const int16_t* x, int inputs) {
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < inputs; i++) sum += int32_t(w[i]) * x[i];
    return sum;
}

constexpr int HEAD_TILE_TOKENS = simd::WIDTH == 64 ? 4 : 2;

struct PanelBounds {     // of one token's logits in a panel
    float best;          // the largest
    float upper, lower;  // the largest logit with its margin added; of a token, with its margin subtracted
};

// Logits of the first `count` rows of a panel for all tokens, to logits[token * stride + row], and bounds[token *
// bounds_stride]. The rows from `pieces` on, which may lie outside of the panel, have no token.
template <int BITS>
inline void head_logits(const uint8_t* w, const HeadPanel& panel, int count, int pieces, const HeadInput* x, int tokens,
                        int quads, float* logits, size_t stride, PanelBounds* bounds, size_t bounds_stride) {
    for (int t = 0; t < tokens; t += HEAD_TILE_TOKENS) {
        uint32_t products[HEAD_TILE_TOKENS * HEAD_PANEL_ROWS];
        const int now = std::min(HEAD_TILE_TOKENS, tokens - t);
        if (now == HEAD_TILE_TOKENS) head_products<BITS, HEAD_TILE_TOKENS>(w, x + t, quads, products);
        else
            for (int i = 0; i < now; i++) head_products<BITS, 1>(w, x + t + i, quads, products + i * HEAD_PANEL_ROWS);
        for (int i = 0; i < now; i++) {
            const HeadInput& in = x[t + i];
            float values[HEAD_PANEL_ROWS], best = -INFINITY, upper = -INFINITY, lower = -INFINITY;
            for (int r = 0; r < HEAD_PANEL_ROWS; r++) {
                const uint32_t zero_term = BITS == 8 ? uint32_t(panel.zero_term[r]) : uint32_t(in.zero_term);
                values[r] = float(int32_t(products[i * HEAD_PANEL_ROWS + r] - zero_term)) * (in.scale * panel.scale[r]);
            }
            for (int r = count; r < HEAD_PANEL_ROWS; r++) values[r] = -INFINITY;
#pragma omp simd reduction(max : best, upper, lower)
            for (int r = 0; r < HEAD_PANEL_ROWS; r++) {
                best = std::max(best, values[r]);
                upper = std::max(upper, values[r] + in.margin * panel.scale[r]);
                lower = std::max(lower, r < pieces ? values[r] - in.margin * panel.scale[r] : -INFINITY);
            }
            std::memcpy(logits + (t + i) * stride, values, size_t(count) * sizeof(float));
            bounds[(t + i) * bounds_stride] = {best, upper, lower};
        }
    }
}
