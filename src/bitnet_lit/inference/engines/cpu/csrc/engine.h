// One step of a decoder: embedding, layers, output head. README.md draws it.
//
// A step takes rows (token, position, cache). A prompt is many rows of one text, a batch is one row of each of many
// texts; both share one pass over the weights. Thread 0 walks through the layers. Each is four parallel loops
// (thread_pool.h), and about twice as many where there are several rows.
//
// Steps of several callers run one after the other, because each uses all threads.
//
// The mathematics is that of model/layers.py and quant/bit_linear.py. Integers are equal; float sums run in another
// order.
#pragma once

#include <memory>
#include <mutex>
#include <numeric>

#include "attention.h"
#include "lm_head.h"
#include "projection.h"
#include "rms_norm.h"
#include "rotary.h"

namespace {

struct Row {
    int32_t token, position;
    Cache* cache;
};

struct Engine {
    Shape s;
    CacheShape cache_shape;
    std::vector<Layer> layers;
    Weights w;
    ThreadPool pool;
    Projections projections;
    std::mutex step_mutex;
    int attention_size, row_stride;
    int kv_heads_unit, out_unit, ffn_unit, down_unit;   // key/value heads, or rows, that a thread takes at once
    Buffer<float> x, q, k, v, attention_out, gate, up;  // activations of all rows: (rows, row_stride)
    Buffer<float> x0;                                   // the embeddings, where a layer adds them again
    bool has_scales = false;                            // whether layers have scales
    RotaryTable rotary;
    LmHead head;
    int capacity = 0;  // rows

    Engine(const Shape& shape, const Layer* l, const Weights& weights)
        : s(shape),
          cache_shape{s.layers * s.kv_heads, s.head_dim, s.context, CacheType(s.cache_type)},
          layers(l, l + shape.layers),
          w(weights),
          pool(shape.threads),
          projections(s, pool),
          attention_size(s.heads * s.head_dim),
          row_stride(projections.row_stride()) {
        const int whole = PANEL_ROWS / std::gcd(PANEL_ROWS, s.head_dim);  // heads that fill whole panels
        kv_heads_unit = s.kv_heads / whole >= pool.count ? whole : 1;
        out_unit = projections.chunk_rows(s.hidden, attention_size);
        ffn_unit = projections.chunk_rows(s.ffn, s.hidden);
        down_unit = projections.chunk_rows(s.hidden, s.ffn);
        for (const Layer& layer : layers) has_scales |= layer.residual_scale || layer.x0_scale;
    }

    void reserve(int rows) {
        if (rows <= capacity) return;
        capacity = 0;  // in case that memory ends half-way
        for (auto* buffer : {&x, &q, &k, &v, &attention_out, &gate, &up}) buffer->reset(size_t(rows) * row_stride);
        if (has_scales) x0.reset(size_t(rows) * row_stride);
        projections.reserve(rows);
        if (s.head_bits < 32) head.reserve(rows, pool.count, s.hidden);
        capacity = rows;
    }

    void embed(int token, float* out) const {
        with_row(w.embedding, token, s.hidden, [&](const auto* row) {
            for (int i = 0; i < s.hidden; i++) out[i] = as_float(row[i]);
        });
    }

    // x = residual_scale * x + x0_scale * x0, of all rows.
    void scale_input(int index, int count) {
        const Layer& l = layers[index];
        const float r = l.residual_scale ? *l.residual_scale : 1, a = l.x0_scale ? *l.x0_scale : 0;
        pool.parallel_for(count, [=, this](int, auto& next_chunk) {
            for (int t; (t = next_chunk()) >= 0;) {
                float* row = x + size_t(t) * row_stride;
                const float* first = x0 + size_t(t) * row_stride;
                for (int i = 0; i < s.hidden; i++) row[i] = r * row[i] + a * first[i];
            }
        });
    }

    // value += 2 * sigmoid(gate . normed) * row of the table: the value embedding of one key/value head of a token.
    NOINLINE void add_value_row(const Layer& l, int head, int token, const float* normed, float* value) const {
        const int p = s.head_dim, inputs = std::min(VALUE_GATE_INPUTS, s.hidden);
        float sum = 0;
        for (int i = 0; i < inputs; i++) sum += l.value_gate[head * inputs + i] * normed[i];
        const float gate = 2.0f / (1.0f + fast_exp(-sum));
        with_row(l.value_table, token, s.kv_heads * p, [&](const auto* row) {
            for (int i = 0; i < p; i++) value[i] += gate * as_float(row[head * p + i]);
        });
    }

    // The norm of a query or key head, where the network has one (Qwen 3), and its rotation.
    void place_head(float* head, const float* norm, int position) const {
        if (norm) rms_norm(head, norm, s.head_dim, s.eps, head);
        rotary.rotate(head, s.head_dim, position);
    }

    // Attention of the query heads that share key/value heads [from, to) of layer `index`, for all rows.
    template <class E>
    void attend_heads(int from, int to, int index, const Row* rows, int count) {
        const int p = s.head_dim, group = s.heads / s.kv_heads;
        thread_local std::vector<Query> queries;
        thread_local std::vector<float> scores;
        for (int h = from; h < to; h++)
            for (int t = 0, next; t < count; t = next) {
                const Cache* cache = rows[t].cache;
                queries.clear();
                for (next = t; next < count && rows[next].cache == cache; next++)
                    for (int g = h * group; g < (h + 1) * group; g++) {
                        const size_t at = size_t(next) * row_stride + g * p;
                        queries.push_back({q + at, attention_out + at, rows[next].position + 1});
                    }
                const size_t stride = round_up(rows[next - 1].position + 1, LANES);
                scores.resize(std::max(scores.size(), TILE_QUERIES * stride));
                attend<E>(*cache, cache_shape, index * s.kv_heads + h, queries.data(), int(queries.size()),
                          scores.data(), stride);
            }
    }

    // x += o_proj(attention(q_proj(x), k_proj(x), v_proj(x))). Threads divide the key/value heads, each with its query
    // heads, so that a thread attends to what it wrote itself. Where they divide tokens, attention is a loop of its
    // own.
    template <class E>
    void attention_block(int index, const Row* rows, int count) {
        const Layer* l = &layers[index];
        const int p = s.head_dim, group = s.heads / s.kv_heads;
        const bool tokens_divided = projections.divides_tokens(count);
        projections.for_rows({x, l->input_norm, s.hidden}, count, s.kv_heads, kv_heads_unit,
                             [=, this](const auto& in, int from, int to, int first, int last) {
            projections.multiply(
                {{l->q, from * group * p, to * group * p, q}, {l->k, from * p, to * p, k}, {l->v, from * p, to * p, v}},
                in, first, last, assign);
            for (int t = first; t < last; t++) {
                const size_t at = size_t(t) * row_stride;
                for (int g = from * group; g < to * group; g++) place_head(q + at + g * p, l->q_norm, rows[t].position);
                for (int h = from; h < to; h++) {
                    place_head(k + at + h * p, l->k_norm, rows[t].position);
                    if (l->value_gate)
                        add_value_row(*l, h, rows[t].token, projections.normed(in.slot + t), v + at + h * p);
                    store_kv<E>(*rows[t].cache, cache_shape, index * s.kv_heads + h, rows[t].position, k + at + h * p,
                                v + at + h * p);
                }
            }
            if (!tokens_divided) attend_heads<E>(from, to, index, rows, count);
        });
        if (tokens_divided)
            pool.parallel_for(s.kv_heads, [=, this](int, auto& next_chunk) {
                for (int h; (h = next_chunk()) >= 0;) attend_heads<E>(h, h + 1, index, rows, count);
            });
        projections.for_rows({attention_out, l->attn_norm, attention_size}, count, s.hidden, out_unit,
                             [=, this](const auto& in, int from, int to, int first, int last) {
            projections.multiply({{l->o, from, to, x}}, in, first, last, accumulate);
        });
    }

    // x += down_proj(act(gate_proj(x)) * up_proj(x)).
    void feed_forward_block(int index, int count) {
        const Layer* l = &layers[index];
        projections.for_rows({x, l->post_norm, s.hidden}, count, s.ffn, ffn_unit,
                             [=, this](const auto& in, int from, int to, int first, int last) {
            projections.multiply({{l->gate, from, to, gate}, {l->up, from, to, up}}, in, first, last, assign);
            for (int t = first; t < last; t++) {
                float *g = gate + size_t(t) * row_stride, *u = up + size_t(t) * row_stride;
                if (s.relu2)
                    for (int i = from; i < to; i++) g[i] = (g[i] < 0 ? 0 : g[i] * g[i]) * u[i];  // a NaN stays one
                else
                    for (int i = from; i < to; i++) g[i] = g[i] / (1.0f + fast_exp(-g[i])) * u[i];
            }
        });
        projections.for_rows({gate, l->ffn_norm, s.ffn}, count, s.hidden, down_unit,
                             [=, this](const auto& in, int from, int to, int first, int last) {
            projections.multiply({{l->down, from, to, x}}, in, first, last, accumulate);
        });
    }

    // The final norm of one row, and its rounding for an integer head.
    template <int BITS>
    NOINLINE void head_input(const float* in, int slot) {
        float* row = projections.normed(slot);
        rms_norm(in, w.norm, s.hidden, s.eps, row);
        if constexpr (BITS < 32) head.quantize_input<BITS>(row, s.hidden, slot);
    }

    template <int BITS>
    void head_block(const std::vector<int>& wanted, float* logits) {
        const int count = int(wanted.size());
        pool.parallel_for(count, [=, this, wanted = wanted.data()](int, auto& next_chunk) {
            for (int i; (i = next_chunk()) >= 0;) head_input<BITS>(x + size_t(wanted[i]) * row_stride, i);
        });
        if constexpr (BITS == 32) head.float_logits(w, s, pool, projections.normed(0), row_stride, count, logits);
        else head.logits<BITS>(w, s, pool, projections.normed(0), row_stride, count, logits);
    }

    // Logits of the rows named in `wanted`: (wanted, vocab). Throws std::bad_alloc where memory ends, and ShortRead;
    // the texts of the step cannot go on then, but the engine can.
    void step(const std::vector<Row>& rows, const std::vector<int>& wanted, float* logits) {
        const std::lock_guard<std::mutex> lock(step_mutex);
        const int count = int(rows.size());
        reserve(count);
        if (s.head_bits < 32) head.reserve_logits(int(wanted.size()), s.vocab);
        int longest = 0;
        for (const Row& row : rows) longest = std::max(longest, row.position + 1);
        rotary.reserve(longest, s.head_dim, s.context, s.rope_theta);
        for (int t = count - 1; t >= 0; t--) rows[t].cache->grow(cache_shape, rows[t].position + 1);
        for (int t = 0; t < count; t++) embed(rows[t].token, x + size_t(t) * row_stride);
        if (has_scales) std::memcpy(x0, x, size_t(count) * row_stride * sizeof(float));
        for (int i = 0; i < s.layers; i++) {
            if (has_scales) scale_input(i, count);
            if (cache_shape.type == CACHE_INT8) attention_block<int8_t>(i, rows.data(), count);
            else if (cache_shape.type == CACHE_HALF) attention_block<float16>(i, rows.data(), count);
            else attention_block<float>(i, rows.data(), count);
            feed_forward_block(i, count);
        }
        if (wanted.empty()) return;  // a part of a long prompt
        if (s.head_bits == 4) head_block<4>(wanted, logits);
        else if (s.head_bits == 8) head_block<8>(wanted, logits);
        else head_block<32>(wanted, logits);
    }
};

}  // namespace
