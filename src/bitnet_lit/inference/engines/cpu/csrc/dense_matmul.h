// Products of dense rows (float32 or bfloat16) with float32 activations: the layers of a dense model, and those rows of
// the output head whose logits must be exact.
#pragma once

#include <vector>

#include "float_simd.h"

// One row of weights times T tokens; x has `stride` floats from one token to the next. Each weight is loaded once.
template <int T, class Weight>
inline void dense_tile_dot(const Weight* w, const float* x, size_t stride, int n, float* out) {
    constexpr int CHAINS = 4;  // accumulators that do not wait for each other's additions
    FloatVec sums[T][CHAINS]{};
    int i = 0;
    for (; i + CHAINS * LANES <= n; i += CHAINS * LANES) {
        prefetch((const char*)(w + i) + PREFETCH_BYTES);
        for (int c = 0; c < CHAINS; c++) {
            const FloatVec weights = load_floats(w + i + c * LANES);
            for (int t = 0; t < T; t++)
                sums[t][c] = fmadd(weights, load_floats(x + t * stride + i + c * LANES), sums[t][c]);
        }
    }
    for (int t = 0; t < T; t++) {
        float sum = horizontal_sum((sums[t][0] + sums[t][1]) + (sums[t][2] + sums[t][3]));
        for (int j = i; j < n; j++) sum = std::fma(as_float(w[j]), x[t * stride + j], sum);
        out[t] = sum;
    }
}

constexpr int DENSE_TOKENS = LANES == 16 ? 4 : 2;  // tokens whose accumulators fit into the registers

// One row of weights times `tokens` tokens, out[token].
template <class Weight>
inline void dense_row_dot(const Weight* w, const float* x, size_t stride, int tokens, int n, float* out) {
    int t = 0;
    for (; t + DENSE_TOKENS <= tokens; t += DENSE_TOKENS)
        dense_tile_dot<DENSE_TOKENS>(w, x + t * stride, stride, n, out + t);
    for (; t < tokens; t++) dense_tile_dot<1>(w, x + t * stride, stride, n, out + t);
}

// Rows [from, to) of a matrix times `tokens` tokens; epilogue(row, token, value) gets each product.
template <class Weight, class Epilogue>
inline void dense_matmul(const Weight* w, int from, int to, const float* x, size_t stride, int tokens, int inputs,
                         const Epilogue& epilogue) {
    thread_local std::vector<float> products;
    products.resize(tokens);
    for (int row = from; row < to; row++) {
        dense_row_dot(w + size_t(row) * inputs, x, stride, tokens, inputs, products.data());
        for (int t = 0; t < tokens; t++) epilogue(row, t, products[t]);
    }
}
