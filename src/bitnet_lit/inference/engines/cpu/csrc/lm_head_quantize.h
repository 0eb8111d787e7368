// The output head in integers: its rows, and the activations that enter it.
//
// A small model reads half of its bytes in the output head, and the head was not trained to be rounded. Its rows are
// rounded to 8 or 4 bits with a scale for each row, and activations so finely that nearly all of the error comes from
// the rows. lm_head.h computes likely tokens again, more exactly; this file says how large the error can be
// (HeadInput).
//
// Layout. Rows lie in panels of 16. Four inputs of each row, a quad, are 64 bytes (at 8 bits), so an int32 lane belongs
// to one row. Processors multiply unsigned with signed bytes, so one of the two factors is shifted to be unsigned:
//
//     8 bits  Activations are int12, shifted by ZERO_POINT to be unsigned and split into two halves of 6 bits:
//                 x ~ scale * (64 * high + low - 2048)
//                 w . x ~ row_scale * scale * (64 * w . high + w . low - 2048 * sum(w))
//             Sums of two products of such halves fit into AVX2's int16 lanes.
//     4 bits  Weights are stored as code + 8, an even quad in the lower half of a byte and the odd quad after it in the
//             upper half; activations are int8:
//                 w . x ~ row_scale * scale * ((code + 8) . x - 8 * sum(x))
//             Beside them all rows are kept in int8, one row after the other, because only some are read; int12
//             activations are their other factor.
#pragma once

#include "buffer.h"
#include "float_simd.h"

constexpr int HEAD_PANEL_ROWS = 16, HALF_BITS = 6, ZERO_POINT = 1 << (2 * HALF_BITS - 1);
template <int BITS>
constexpr int MAX_CODE = (1 << (BITS - 1)) - 1;

inline int head_panels_of(int vocab) { return (vocab + HEAD_PANEL_ROWS - 1) / HEAD_PANEL_ROWS; }
inline int quads_of(int inputs) { return padded(inputs) / 4; }
template <int BITS>
inline size_t head_panel_bytes(int inputs) {
    return size_t(quads_of(inputs)) * 64 * BITS / 8;
}

struct HeadPanel {  // of each row; a row beyond the vocabulary has scale 0
    float scale[HEAD_PANEL_ROWS];
    int32_t zero_term[HEAD_PANEL_ROWS];  // 8 bits: ZERO_POINT times the sum of the codes, modulo 2**32
};

// Rounds (vocab, inputs) weights to panels of codes, which must be zero before; for 4 bits also to int8 rows (vocab,
// padded(inputs)).
template <int BITS, class Weight>
inline void quantize_head(const Weight* weights, int vocab, int inputs, uint8_t* codes, HeadPanel* panels,
                          int8_t* int8_rows) {
    Buffer<float> row{size_t(inputs)};
    for (int r = 0; r < vocab; r++) {
        for (int i = 0; i < inputs; i++) row[i] = as_float(weights[size_t(r) * inputs + i]);
        const float largest = std::max(abs_max(row, inputs), 1e-12f), scale = largest / float(MAX_CODE<BITS>);
        if constexpr (BITS == 4)
            for (int i = 0; i < inputs; i++)
                int8_rows[size_t(r) * padded(inputs) + i] = int8_t(round_clamped(row[i] * (127.0f / largest), 127.0f));
        uint8_t* out = codes + r / HEAD_PANEL_ROWS * head_panel_bytes<BITS>(inputs) + r % HEAD_PANEL_ROWS * 4;
        int32_t sum = 0;
        for (int i = 0; i < inputs; i++) {
            const int32_t code = round_clamped(row[i] / scale, float(MAX_CODE<BITS>)), quad = i / 4;
            if constexpr (BITS == 8) out[quad * 64 + i % 4] = uint8_t(code);
            else out[quad / 2 * 64 + i % 4] |= uint8_t((code + 8) << quad % 2 * 4);
            sum += code;
        }
        HeadPanel& panel = panels[r / HEAD_PANEL_ROWS];
        panel.scale[r % HEAD_PANEL_ROWS] = scale;
        panel.zero_term[r % HEAD_PANEL_ROWS] = BITS == 8 ? int32_t(uint32_t(sum) * ZERO_POINT) : 0;
    }
}

// One token as it enters the head.
struct HeadInput {
    uint8_t *high, *low;  // 8 bits: the halves of its int12 codes. 4 bits: `high` holds int8 codes, `low` is not used
    int32_t zero_term;    // 4 bits: eight times the sum of the int8 codes
    float scale;          // of those codes
    float margin;         // times a row's scale: six standard deviations of the error of that row's logit
    int16_t* int12;       // 4 bits: int12 codes for the int8 rows
    float int12_scale;
};

// Rounds the activations of one token; `to` has room for padded(inputs) codes of each kind.
//
// The margin: rounding errors are taken as independent and uniform. A row's weights are off by row_scale / sqrt(12)
// each, and so are multiplied with activations x. The activations are off by scale / sqrt(12) each, and are multiplied
// with weights of at most MAX_CODE row scales.
template <int BITS>
inline void quantize_head_input(const float* x, int inputs, HeadInput& to) {
    const int int12_max = std::min(ZERO_POINT - 1, INT32_MAX / (127 * inputs));  // so that a whole product fits int32
    const int max_code = BITS == 8 ? int12_max : 127;
    const float largest = std::max(abs_max(x, inputs), 1e-5f), factor = float(max_code) / largest;
    int32_t sum = 0;
    for (int i = 0; i < inputs; i++) {
        const int32_t code = round_clamped(x[i] * factor, float(max_code)), shifted = code + ZERO_POINT;
        if constexpr (BITS == 8)
            to.high[i] = uint8_t(shifted >> HALF_BITS), to.low[i] = uint8_t(shifted & ((1 << HALF_BITS) - 1));
        else to.high[i] = uint8_t(code), sum += code;
    }
    if constexpr (BITS == 4)
        for (int i = 0; i < inputs; i++)
            to.int12[i] = int16_t(round_clamped(x[i] * (float(int12_max) / largest), float(int12_max)));
    to.zero_term = 8 * sum, to.scale = largest / float(max_code), to.int12_scale = largest / float(int12_max);
    const float largest_weight = float(MAX_CODE<BITS>) * to.scale;
    to.margin = 6.0f * std::sqrt((sum_of_squares(x, inputs) + float(inputs) * largest_weight * largest_weight) / 12.0f);
}
