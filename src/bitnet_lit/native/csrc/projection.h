// The projections of a layer: one matrix, or several with the same input (q, k, v; gate, up) as one.
//
// y = x_codes @ weight_codes.T * (x_scale * weight_scale)        quantized
// y = x @ weight.T                                               dense
//
// With int8 products (AVX-512 VNNI) the weights are stored as codes + 1, which are unsigned; the sum of a token's codes
// is subtracted at the end. Elsewhere the codes are multiplied as floats. Both give the same integers.
#pragma once

#include "matmul.h"
#include "parallel.h"
#include "rows.h"

constexpr int TILE = LANES == 16 ? 64 : 4 * ROWS;  // tokens that are worked on at once
constexpr int ROW_BLOCK = 8 * ROWS;                // rows of a weight matrix in one task

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr bool HAS_INT8 = true;
#else
constexpr bool HAS_INT8 = false;
#endif

enum Rounding : int32_t { AS_IS, TERNARY, SIGN };

struct Matrix {           // (rows, inputs) of one projection
    const float* weight;  // latent; with AS_IS, dense weights or codes
    const float* scale;   // NULL counts as 1
    const float* center;  // of SIGN
    int32_t rows, rounding, scales;

    float factor(int row) const { return scale ? scale[scales == 1 ? 0 : row] : 1.0f; }
    // Row `row` of the codes, or of the weights: quant/weights.py, with the same operations on floats.
    void codes(int row, int inputs, float* to) const {
        const float* const from = weight + int64_t(row) * inputs;
        if (rounding == TERNARY) {
            const float inverse = 1.0f / *scale;
#pragma omp simd
            for (int i = 0; i < inputs; i++) to[i] = std::min(1.0f, std::max(-1.0f, std::nearbyint(from[i] * inverse)));
        } else if (rounding == SIGN) {
            const float middle = *center;
#pragma omp simd
            for (int i = 0; i < inputs; i++) to[i] = from[i] >= middle ? 1.0f : -1.0f;
        } else {
            std::copy(from, from + inputs, to);
        }
    }
};

struct Activations {  // the input of a projection, kept for the backward pass: codes and scales, or floats
    int8_t* codes;
    float* scale;
    float* floats;
};

struct Norm {  // without a weight it passes its input on
    const float* weight;
    float* rstd;  // (M,), kept for the backward pass
    float eps;

    // The input of a projection: tokens first..first + m of n floats, normalized, and quantized where x has codes.
    void forward(const float* x, int n, int64_t first, int m, float limit, const Activations& to) const {
        float* const h = scratch(19, n);
        for (int64_t i = first; i < first + m; i++, x += n) {
            float* const normal = to.codes ? h : to.floats + i * n;
            if (weight) {
                rstd[i] = inverse_rms(x, n, eps);
                normalize(x, weight, rstd[i], n, normal);
            } else if (!to.codes) {
                std::copy(x, x + n, normal);
            }
            if (to.codes) to.scale[i] = quantize_row(weight ? h : x, n, limit, to.codes + i * n);
        }
    }
    // dh becomes dx. The gradient of the weight is added to d_weight.
    void backward(const float* x, int n, int64_t first, int m, float* dh, float* d_weight) const {
        if (weight)
            for (int64_t i = 0; i < m; i++)
                normalize_backward(x + i * n, weight, rstd[first + i], n, dh + i * n, d_weight);
    }
};

// The sum of one row of n floats for each tile.
inline void sum_of_tiles(const float* sums, int64_t tiles, int64_t row, int n, float* to) {
    std::fill(to, to + n, 0.0f);
    for (int64_t tile = 0; tile < tiles; tile++) add(to, sums + tile * row, n, to);
}

class Projection {
   public:
    Projection(const Matrix* matrices, int count, int inputs, bool quantized, bool int8)
        : matrices_(matrices),
          count_(count),
          inputs_(inputs),
          quantized_(quantized),
          int8_(HAS_INT8 && int8 && inputs % 4 == 0),
          has_codes_(quantized && int8) {
        for (int i = 0; i < count; i++) outputs_ += matrices[i].rows;
    }
    int inputs() const { return inputs_; }
    // AMX needs depths of whole blocks, and gains nothing on small matrices.
    bool is_large() const { return outputs_ >= AMX_SIZE && inputs_ >= AMX_SIZE; }
    bool splits_forward() const { return has_amx() && !quantized_ && inputs_ % 32 == 0 && is_large(); }
    bool splits_backward() const { return has_amx() && outputs_ % 32 == 0 && is_large(); }
    bool splits_gradient() const { return has_amx() && is_large(); }
    int outputs() const { return outputs_; }

    // Rounds and packs the weights for `forward`, panel by panel.
    int64_t forward_floats() const { return panel_floats(inputs_, outputs_) + int64_t(panels_of(outputs_)) * PANEL; }
    int64_t panels() const { return panels_of(outputs_); }
    Blocks row_blocks(int threads) const { return {outputs_, ROW_BLOCK, LANES == 16 ? 32 : ROWS, threads}; }
    void pack_forward(int64_t panel, float* to) const {
        const int first = int(panel) * PANEL, columns = std::min(PANEL, outputs_ - first);
        float* const rows = scratch(0, int64_t(PANEL) * inputs_);
        uint8_t* const bytes = scratch<uint8_t>(1, int64_t(PANEL) * inputs_);
        float* const factors = to + panel_floats(inputs_, outputs_);
        for (int j = 0; j < PANEL; j++) {
            const auto [matrix, row] = find(first + std::min(j, columns - 1));
            float* const codes = rows + int64_t(j) * inputs_;
            uint8_t* const byte_row = bytes + int64_t(j) * inputs_;
            matrix->codes(row, inputs_, codes);
            factors[first + j] = matrix->factor(row);
            if (int8_)
#pragma omp simd
                for (int p = 0; p < inputs_; p++) byte_row[p] = uint8_t(int32_t(codes[p]) + 1);
        }
        if (int8_) {  // four neighbouring bytes of a row are moved like a float
            const int words = inputs_ / 4;
            return pack_panel_transposed(words, PANEL, reinterpret_cast<const float*>(bytes), words,
                                         to + int64_t(first) * words);
        }
        pack_panel_transposed(inputs_, columns, rows, inputs_, to + int64_t(first) * inputs_);
        if (splits_forward()) split_panel(inputs_, to + int64_t(first) * inputs_);
    }

    // y (m, outputs) for m tokens that begin at token `first` of x.
    void forward(const float* packed, const Activations& x, int64_t first, int m, float* y, int64_t ldy) const {
        if (!quantized_)
            return multiply(m, outputs_, inputs_, {x.floats + first * inputs_, inputs_, 1}, packed, y, ldy,
                            splits_forward());
        const int8_t* const codes = x.codes + first * inputs_;
        const float* const factors = packed + panel_floats(inputs_, outputs_);
        if (int8_)
            return multiply_int8(m, codes, reinterpret_cast<const uint8_t*>(packed), x.scale + first, factors, y, ldy);
        float* const floats = scratch(0, int64_t(m) * inputs_);
        std::copy(codes, codes + int64_t(m) * inputs_, floats);
        multiply(m, outputs_, inputs_, {floats, inputs_, 1}, packed, y, ldy, false);
        for (int i = 0; i < m; i++)
#pragma omp simd
            for (int j = 0; j < outputs_; j++) y[i * ldy + j] *= x.scale[first + i] * factors[j];
    }

    // Packs codes * scale for `backward`, from row `begin` to row `end`. The matrix unit gets the codes, which are
    // exact there, and the scales are left to dy.
    bool scales_dy() const { return has_codes_ && splits_backward(); }
    int64_t backward_floats() const { return panel_floats(outputs_, inputs_) + outputs_; }
    void pack_backward(int begin, int end, float* to) const {
        float* const codes = scratch(0, inputs_ + PANEL);
        for (int n = begin; n < end; n++) {
            const auto [matrix, row] = find(n);
            matrix->codes(row, inputs_, codes);
            const float factor = to[panel_floats(outputs_, inputs_) + n] = matrix->factor(row);
            if (!scales_dy())
#pragma omp simd
                for (int i = 0; i < inputs_; i++) codes[i] *= factor;
            for (int j = 0; j < inputs_; j += PANEL)
                pack_row(std::min(PANEL, inputs_ - j), codes + j, to + int64_t(j) * outputs_ + int64_t(n) * PANEL);
        }
        if (splits_backward())
            for (int j = 0; j < inputs_; j += PANEL)
                split_panel(end - begin, to + int64_t(j) * outputs_ + int64_t(begin) * PANEL);
    }

    // dx (m, inputs) from dy (m, outputs).
    void backward(const float* packed, const float* dy, int64_t ldy, int m, float* dx, int64_t ldx) const {
        const Strided a{dy, ldy, 1};
        if (scales_dy())
            return multiply_split(m, inputs_, outputs_, a, packed, dx, ldx, false, outputs_,
                                  packed + panel_floats(outputs_, inputs_));
        multiply(m, inputs_, outputs_, a, packed, dx, ldx, splits_backward());
    }

    // The inputs of all m tokens, packed by chunks for `weight_gradient`.
    Chunks chunks(int m) const { return {m, inputs_, splits_gradient()}; }
    void pack_inputs(const Activations& x, const Chunks& chunks, int chunk, float* to) const {
        float* const row = scratch(2, inputs_);
        chunks.pack(chunk, to, [&](int64_t token) -> const float* {
            if (!quantized_) return x.floats + token * inputs_;
            const int8_t* const codes = x.codes + token * inputs_;
            const float scale = splits_gradient() ? 1.0f : x.scale[token];
#pragma omp simd
            for (int i = 0; i < inputs_; i++) row[i] = float(codes[i]) * scale;
            return row;
        });
    }

    // Rows begin..end of the weights' gradient (outputs, inputs), from dy and the packed inputs of x.
    void weight_gradient(int begin, int end, const float* dy, int64_t ldy, const Activations& x, const Chunks& chunks,
                         const float* packed, float* gradient) const {
        const float* factors = nullptr;
        if (quantized_ && chunks.is_split) {  // the packed inputs are codes
            float* const scales = scratch(3, (chunks.rows + 31) / 32 * 32);
            std::copy(x.scale, x.scale + chunks.rows, scales);
            std::fill(scales + chunks.rows, scales + (chunks.rows + 31) / 32 * 32, 0.0f);
            factors = scales;
        }
        multiply_transposed(end - begin, dy + begin, ldy, chunks, packed, gradient + int64_t(begin) * inputs_, inputs_,
                            false, factors);
    }

   private:
    std::pair<const Matrix*, int> find(int n) const {
        int i = 0;
        for (; n >= matrices_[i].rows; i++) n -= matrices_[i].rows;
        return {matrices_ + i, n};
    }

    // The sum of the codes of a row.
    int32_t code_sum(const int8_t* codes) const {
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int p = 0; p < inputs_; p++) sum += codes[p];
        return sum;
    }

    // LANES columns of y, from the products with codes + 1.
    static void finish(IntVec sums, int32_t code_sum, const float* factors, float x_scale, float* y) {
        const FloatVec factor = load_floats(factors) * broadcast(x_scale);
        store_floats(y, __builtin_convertvector(sums - code_sum, FloatVec) * factor);
    }

    template <int R>
    NOINLINE void int8_rows(const int8_t* codes, const int32_t* code_sums, const uint8_t* panel, const float* x_scale,
                            const float* factors, float* y, int64_t ldy, int columns) const {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
        __m512i sums[R][PANEL_VECS];
#pragma GCC unroll 16
        for (int i = 0; i < R; i++)
#pragma GCC unroll 16
            for (int v = 0; v < PANEL_VECS; v++) sums[i][v] = _mm512_setzero_si512();
        for (int p = 0; p < inputs_; p += 4) {
            __m512i b[PANEL_VECS];
#pragma GCC unroll 16
            for (int v = 0; v < PANEL_VECS; v++) b[v] = _mm512_loadu_si512(panel + p * PANEL + v * 64);
#pragma GCC unroll 16
            for (int i = 0; i < R; i++) {
                int32_t four;
                std::memcpy(&four, codes + int64_t(i) * inputs_ + p, 4);
                const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 16
                for (int v = 0; v < PANEL_VECS; v++) sums[i][v] = _mm512_dpbusd_epi32(sums[i][v], b[v], x);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) {
            float line[PANEL];
            float* const to = columns >= PANEL ? y + i * ldy : line;
#pragma GCC unroll 16
            for (int v = 0; v < PANEL_VECS; v++)
                finish((IntVec)sums[i][v], code_sums[i], factors + v * LANES, x_scale[i], to + v * LANES);
            if (columns < PANEL) std::copy(line, line + columns, y + i * ldy);
        }
#endif
    }
    using Int8Rows = void (Projection::*)(const int8_t*, const int32_t*, const uint8_t*, const float*, const float*,
                                          float*, int64_t, int) const;
    template <int... R>
    static Int8Rows int8_rows_of(int rows, std::integer_sequence<int, R...>) {
        Int8Rows found = nullptr;
        ((rows == R + 1 ? void(found = &Projection::int8_rows<R + 1>) : void()), ...);
        return found;
    }
    // 32 rows on the matrix unit (amx.h).
    void int8_tiles(const int8_t* codes, const int32_t* code_sums, const uint8_t* panel, const float* x_scale,
                    const float* factors, float* y, int64_t ldy, int columns) const {
        alignas(64) int32_t sums[32 * PANEL];
        multiply_bytes(inputs_ / 64, codes, inputs_, panel, sums);
        for (int i = 0; i < 32; i++) {
            float line[PANEL];
            float* const to = columns >= PANEL ? y + i * ldy : line;
            for (int v = 0; v < PANEL; v += LANES) {
                IntVec part;
                std::memcpy(&part, sums + i * PANEL + v, sizeof(part));
                finish(part, code_sums[i], factors + v, x_scale[i], to + v);
            }
            if (columns < PANEL) std::copy(line, line + columns, y + i * ldy);
        }
    }

    void multiply_int8(int m, const int8_t* codes, const uint8_t* panels, const float* x_scale, const float* factors,
                       float* y, int64_t ldy) const {
        int32_t* const sums = scratch<int32_t>(1, m);
        for (int i = 0; i < m; i++) sums[i] = code_sum(codes + int64_t(i) * inputs_);
        const int in_tiles = has_amx() && inputs_ % 64 == 0 ? m / 32 * 32 : 0;
        for (int j = 0; j < outputs_; j += PANEL) {
            const uint8_t* const panel = panels + int64_t(j) * inputs_;
            const auto at = [&](int i, const auto& rows) {
                rows(codes + int64_t(i) * inputs_, sums + i, panel, x_scale + i, factors + j, y + i * ldy + j, ldy,
                     outputs_ - j);
            };
            for (int i = 0; i < in_tiles; i += 32) at(i, [&](auto... a) { int8_tiles(a...); });
            for (int i = in_tiles; i < m; i += ROWS) {
                const auto rows = int8_rows_of(std::min(ROWS, m - i), std::make_integer_sequence<int, ROWS>{});
                at(i, [&](auto... a) { (this->*rows)(a...); });
            }
        }
    }

    const Matrix* matrices_;
    int count_, inputs_, outputs_ = 0;
    bool quantized_, int8_, has_codes_;
};
