// A projection: y = W quantize(norm(x)), for all tokens of a step, divided among the threads.
//
// 1. RMSNorm of each token, where the network has a norm there.
// 2. Each token is rounded to int8 by its own largest magnitude (`AbsMax` of quant/activations.py).
// 3. Packed ternary rows times int8 tokens give int32 sums, exactly (ternary_matmul.h).
// 4. A sum times the token's scale times the matrix' scale is the result in float32, which an epilogue stores or adds.
//
// The threads divide the rows of the matrices. With AVX2 and many tokens they divide the tokens instead, because a
// table of lookup_matmul.h then serves all rows. A dense model skips step 2 and multiplies float rows.
#pragma once

#include "model.h"
#include "rms_norm.h"
#include "ternary_matmul.h"
#include "thread_pool.h"

// Epilogues: what becomes of a result. Types of their own, so that the loops around them are compiled for each.
constexpr auto assign = [](float& place, float value) { place = value; };
constexpr auto accumulate = [](float& place, float value) { place += value; };

struct ProjectionInput {
    const float *x, *norm;  // (tokens, n) activations; the norm's weights, or null
    int n;
};

struct MatrixRows {  // rows [from, to) of a matrix, and where their results go
    const Matrix& matrix;
    int from, to;
    float* out;
};

class Projections {
   public:
    struct Input {  // the tokens of a step as one thread multiplies them: token 0 is in `slot`
        int slot, n;
        TokenCodes codes;
    };

    Projections(const Shape& shape, ThreadPool& threads) : s(shape), pool(threads) {
        // Not a multiple of 4 KiB: addresses that far apart share a set of the first-level cache.
        stride = std::max({padded(s.hidden), padded(s.heads * s.head_dim), padded(s.ffn)}) + 64;
    }

    // Floats (and bytes of int8 codes) from one token to the next, in all activations of a step.
    int row_stride() const { return stride; }

    // Activations of one token after the norm.
    float* normed(int slot) const { return normed_rows + size_t(slot) * stride; }

    // Memory for `rows` tokens.
    void reserve(int rows) {
        // A single token is rounded by every thread for itself: that is cheaper than waiting for another thread's
        // result.
        const size_t slots = std::max(rows, pool.count);
        normed_rows.reset(slots * stride);
        codes.reset(size_t(readable_tokens(int(slots))) * stride), scales.reset(slots), sums.assign(slots, 0);
    }

    // Rows that a thread takes at once: so many that taking them costs little beside their product, but, where there
    // are enough, at least four chunks for each thread.
    int chunk_rows(int rows, int inputs) const {
        const int worthwhile = int(CHUNK_BYTES / panel_bytes(inputs)), enough = panels_of(rows) / (4 * pool.count);
        return PANEL_ROWS * std::max(1, std::min(worthwhile, enough));
    }

    // Whether threads divide the tokens rather than the rows: where that keeps them all about equally busy.
    bool divides_tokens(int tokens) const {
        if (!HAS_LOOKUP || s.dense || tokens < LOOKUP_TOKENS) return false;
        int most = 0;
        for (int part = 0; part < pool.count; part++) {
            const auto [from, to] = part_of(part, pool.count, tokens, LOOKUP_TOKENS);
            most = std::max(most, to - from);
        }
        return most * pool.count <= tokens * 9 / 8;
    }

    // Prepares all tokens, then calls body(input, from, to, first, last) on the threads: for the rows (or heads) [from,
    // to) and the tokens [first, last), until all rows are done for all tokens. Rows stay together in units of `unit`.
    template <class Body>
    void for_rows(const ProjectionInput& in, int tokens, int rows, int unit, const Body& body) {
        if (tokens > 1)
            pool.parallel_for((tokens + QUANTIZE_TOKENS - 1) / QUANTIZE_TOKENS, [=, this](int, auto& next_chunk) {
                for (int chunk; (chunk = next_chunk()) >= 0;)
                    for (int t = chunk * QUANTIZE_TOKENS; t < std::min(tokens, (chunk + 1) * QUANTIZE_TOKENS); t++)
                        norm_and_quantize(in.x + size_t(t) * stride, in.norm, in.n, t);
            });
        const bool tokens_divided = divides_tokens(tokens);
        const int units = (rows + unit - 1) / unit;
        // With many tokens a thread gets one part of the rows: what it unpacks or tabulates, it does only once.
        const int parts = tokens_divided ? pool.count : tokens > FEW_TOKENS ? std::min(pool.count, units) : units;
        pool.parallel_for(parts, [=, this](int thread, auto& next_chunk) {
            int part = next_chunk();
            if (part < 0) return;
            const Input input = input_of(thread, tokens, in);
            for (; part >= 0; part = next_chunk()) {
                const auto [from, to] =
                    tokens_divided ? part_of(part, parts, tokens, LOOKUP_TOKENS) : part_of(part, parts, rows, unit);
                if (tokens_divided) body(input, 0, rows, from, to);
                else body(input, from, to, 0, tokens);
            }
        });
    }

    // Rows of N matrices with the same input times the tokens [first, last), from one thread. epilogue(place, value)
    // gets each result and where it belongs.
    template <int N, class Epilogue>
    void multiply(const MatrixRows (&rows)[N], const Input& in, int first, int last, const Epilogue& epilogue) {
        if (s.dense) {
            for (const MatrixRows& m : rows)
                with_elements(m.matrix, [&](const auto* elements) {
                    dense_matmul(elements, m.from, m.to, normed(in.slot + first), stride, last - first, in.n,
                                 [&](int row, int token, float value) {
                        epilogue(m.out[size_t(first + token) * stride + row], value);
                    });
                });
            return;
        }
        PanelRange ranges[N];
        for (int i = 0; i < N; i++)
            ranges[i] = {rows[i].matrix.packed, rows[i].from / PANEL_ROWS, panels_of(rows[i].to)};
        ternary_matmul(ranges, N, in.codes, first, last,
                       [&](int range, int panel, int token, int count, const int32_t* products) {
            const MatrixRows& m = rows[range];
            // Heads may begin inside a panel; its other rows are another thread's.
            const int begin = std::max(m.from - panel * PANEL_ROWS, 0);
            const int end = std::min(PANEL_ROWS, m.to - panel * PANEL_ROWS);
            float* place = m.out + size_t(token) * stride + panel * PANEL_ROWS;
            for (int t = 0; t < count; t++, place += stride) {
                const float scale = scales[in.slot + token + t] * m.matrix.scale;
                float values[PANEL_ROWS];
                for (int r = 0; r < PANEL_ROWS; r++) values[r] = float(products[t * PANEL_ROWS + r]) * scale;
                if (end - begin == PANEL_ROWS)
                    for (int r = 0; r < PANEL_ROWS; r++) epilogue(place[r], values[r]);
                else
                    for (int r = begin; r < end; r++) epilogue(place[r], values[r]);
            }
        });
    }

   private:
    static constexpr size_t CHUNK_BYTES = 8192;  // of weights that are worth a chunk of their own
    static constexpr int QUANTIZE_TOKENS = 4;    // tokens that a thread rounds at once

    // The norm of one token to `normed`, and its rounding to int8.
    NOINLINE void norm_and_quantize(const float* in, const float* norm, int n, int slot) {
        float* value = normed(slot);
        if (norm) {
            rms_norm(in, norm, n, s.eps, value);
        } else {
            std::memcpy(value, in, size_t(n) * sizeof(float));
        }
        if (s.dense) return;
        int8_t* out = codes + size_t(slot) * stride;
        const float largest = std::max(abs_max(value, n), 1e-5f);
        const float factor = 1.0f / largest * 127.0f;  // PyTorch computes 127 / largest in these two steps
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < n; i++) {
            const int32_t code = round_clamped(value[i] * factor, 127.0f);
            out[i] = int8_t(code), sum += code;
        }
        std::memset(out + n, 0, size_t(blocks_of(n)) * BLOCK_INPUTS - n);
        scales[slot] = largest / 127.0f, sums[slot] = sum;
    }

    // The input for one thread: of several tokens, which are prepared already, or of one, which is prepared here.
    Input input_of(int thread, int tokens, const ProjectionInput& in) {
        const int slot = tokens == 1 ? thread : 0;
        if (tokens == 1) norm_and_quantize(in.x, in.norm, in.n, slot);
        return {slot,
                in.n,
                {codes + size_t(slot) * stride, size_t(stride), s.dense ? 0 : tokens, blocks_of(in.n), &sums[slot]}};
    }

    const Shape& s;
    ThreadPool& pool;
    int stride;
    Buffer<float> normed_rows, scales;  // scales: of each token's codes
    Buffer<int8_t> codes;
    std::vector<int32_t> sums;  // of each token's codes
};
