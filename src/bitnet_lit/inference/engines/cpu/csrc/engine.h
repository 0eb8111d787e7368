// The whole step of a decoder: embedding, norms, int8 activations, ternary products, rotary positions, attention on the
// cache, output head. No Python and no dispatch between two tokens.
//
// A step takes rows (token, sequence, position). One prompt is many rows of one sequence, a batch is one row of each of
// many sequences; both share one pass over the weights. Thread 0 walks through the layers. What there is to do in each,
// four or five times a layer, is divided among the threads (threads.h): heads in the attention, elsewhere rows of the
// matrices or, where there are many, tokens.
//
// Steps of several callers run one after the other, because each takes all threads.
//
// The mathematics is that of model/layers.py and quant/bit_linear.py: the integers are equal, float sums run in another
// order. A dense model runs with float products in place of the integer ones.
#pragma once

#include "attention.h"
#include "logits.h"
#include "products.h"

#include <mutex>

namespace {

// What becomes of a product: functions of their own types, so that the loops around them are compiled with them.
constexpr auto set = [](float& place, float value) { place = value; };
constexpr auto add = [](float& place, float value) { place += value; };

struct Row {
    int32_t token, position;
    Cache* cache;
};

constexpr size_t PIECE_BYTES = 8192;
constexpr int PREPARED = 4;  // tokens that a thread prepares at once

struct Engine {
    Shape s;
    CacheShape cache_shape;
    std::vector<Layer> layers;
    Weights w;
    Pool pool;
    std::mutex turn;  // of the caller whose step runs
    int attention;
    int heads_unit, out_unit, ffn_unit, down_unit;  // key/value heads or rows of a piece
    int widest;                                     // numbers from one token to the next in all that follows
    // of all rows of a step
    Buffer<float> x, q, k, v, attended, gated, raised, normed;
    Buffer<int8_t> codes;
    Buffer<float> scales;
    std::vector<int32_t> sums;
    IntegerHead head;
    Buffer<float> cosine, sine;  // (positions, head_dim / 2)
    int capacity = 0, positions = 0;

    Engine(const Shape& shape, const Layer* l, const Weights& weights)
        : s(shape),
          cache_shape{s.layers * s.kv_heads, s.head_dim, s.context, CacheType(s.cache_type)},
          layers(l, l + shape.layers),
          w(weights),
          pool(shape.threads) {
        attention = s.heads * s.head_dim;
        const int whole = ROWS / std::gcd(ROWS, s.head_dim);  // heads that fill groups of rows
        heads_unit = s.kv_heads / whole >= pool.count ? whole : 1;
        out_unit = piece_rows(s.hidden, attention), ffn_unit = piece_rows(s.ffn, s.hidden),
        down_unit = piece_rows(s.hidden, s.ffn);
        widest = std::max({padded(s.hidden), padded(attention), padded(s.ffn)}) +
                 64;  // not 4 KiB: those would share sets of the caches
    }

    void reserve(int rows) {
        if (rows <= capacity) return;
        capacity = 0;  // where memory ends half-way
        for (auto* buffer : {&x, &q, &k, &v, &attended, &gated, &raised}) buffer->reset(size_t(rows) * widest);
        // One token's codes are made by every thread for itself: cheaper than waiting for another's.
        const size_t copies = std::max(rows, pool.count);
        normed.reset(copies * widest);
        codes.reset(size_t(readable(int(copies))) * widest), scales.reset(copies), sums.assign(copies, 0);
        if (s.head_bits < 32) head.reserve(rows, pool.count, s.hidden);
        capacity = rows;
    }

    // The rotary angles of the first `needed` positions: a context can be long, and a text short.
    void reserve_positions(int needed) {
        if (needed <= positions) return;
        const int half = s.head_dim / 2, room = std::min(std::max({needed, 2 * positions, 64}), s.context);
        positions = 0;
        cosine.reset(size_t(room) * half), sine.reset(size_t(room) * half);
        for (int p = 0; p < room; p++)
            for (int i = 0; i < half; i++) {
                const float angle = float(p) * (1.0f / std::pow(s.rope_theta, float(2 * i) / float(s.head_dim)));
                cosine[size_t(p) * half + i] = std::cos(angle), sine[size_t(p) * half + i] = std::sin(angle);
            }
        positions = room;
    }

    // What enters a projection: the norm (or none) of one token, and of a BitNet its rounding to int8,
    // `AbsMax` of quant/activations.py.
    ONCE void prepare(const float* in, const float* norm, int n, int slot) {
        float* value = normed + size_t(slot) * widest;
        if (norm) {
            const float factor = 1.0f / std::sqrt(sum_of_squares(in, n) / float(n) + s.eps);
            for (int i = 0; i < n; i++) value[i] = in[i] * factor * norm[i];
        } else {
            std::memcpy(value, in, size_t(n) * sizeof(float));
        }
        if (s.dense) return;
        int8_t* out = codes + size_t(slot) * widest;
        const float largest = std::max(largest_magnitude(value, n), 1e-5f), factor = 127.0f / largest;
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < n; i++) {
            const int32_t code = code_of(value[i] * factor, 127.0f);
            out[i] = int8_t(code), sum += code;
        }
        std::memset(out + n, 0, size_t(blocks_of(n)) * BLOCK - n);
        scales[slot] = largest / 127.0f, sums[slot] = sum;
    }

    struct Input {
        const float *x, *norm;
        int n;
    };  // what enters a projection, and its norm; n numbers a token
    struct Entering {
        int slot, n;
        Inputs inputs;
    };  // all rows as a thread multiplies them; row 0 is in `slot`

    // For this thread, after `prepare` of all rows where there are several.
    Entering enter(int thread, int rows, const Input& in) {
        const int slot = rows == 1 ? thread : 0;
        if (rows == 1) prepare(in.x, in.norm, in.n, slot);
        return {slot,
                in.n,
                {codes + size_t(slot) * widest, size_t(widest), s.dense ? 0 : rows, blocks_of(in.n), &sums[slot]}};
    }

    // Whether products are divided by tokens rather than by rows: a table of lookup.h then serves all rows.
    bool by_tokens(int tokens) const {
        if (!LOOKS_UP || s.dense || tokens < LOOKUP_TOKENS) return false;
        int most = 0;
        for (int part = 0; part < pool.count; part++) {
            const auto [from, to] = part_of(part, pool.count, tokens, LOOKUP_TOKENS);
            most = std::max(most, to - from);
        }
        return most * pool.count <= tokens * 9 / 8;
    }

    // Rows of a piece: so many that taking it costs little beside its product, but four for each thread where there
    // are.
    int piece_rows(int rows, int inputs) const {
        const int worth = int(PIECE_BYTES / group_bytes(inputs)), enough = groups_of(rows) / (4 * pool.count);
        return ROWS * std::max(1, std::min(worth, enough));
    }

    // does(entering, from, to, first, last): the rows (or heads) [from, to) of matrices times the tokens [first, last),
    // until all rows and tokens are done.
    template <class Does>
    void divide(const Input& in, int tokens, int rows, int unit, const Does& does) {
        if (tokens > 1)
            pool.divide((tokens + PREPARED - 1) / PREPARED, [=, this](int, auto& next) {
                for (int piece; (piece = next()) >= 0;)
                    for (int t = piece * PREPARED; t < std::min(tokens, (piece + 1) * PREPARED); t++)
                        prepare(in.x + size_t(t) * widest, in.norm, in.n, t);
            });
        const bool tokens_divided = by_tokens(tokens);
        const int units = (rows + unit - 1) / unit;
        // Of many tokens a thread has one part of the rows: what is made of the tokens for it is made once.
        const int parts = tokens_divided ? pool.count : tokens > FEW_TOKENS ? std::min(pool.count, units) : units;
        pool.divide(parts, [=, this](int thread, auto& next) {
            int part = next();
            if (part < 0) return;
            const Entering entering = enter(thread, tokens, in);
            for (; part >= 0; part = next()) {
                const auto [from, to] =
                    tokens_divided ? part_of(part, parts, tokens, LOOKUP_TOKENS) : part_of(part, parts, rows, unit);
                if (tokens_divided) does(entering, 0, rows, from, to);
                else does(entering, from, to, 0, tokens);
            }
        });
    }

    struct Product {
        const Matrix& m;
        int from, to;
        float* out;
    };  // rows [from, to) of a matrix, and where they go

    // Rows of matrices with the same inputs times the tokens [begin, end); use(place, value) gets each value and where
    // it belongs.
    template <int N, class Use>
    void multiply(const Product (&products)[N], const Entering& in, int begin, int end, const Use& use) {
        if (s.dense) {
            for (const Product& p : products)
                multiply_dense(p.m, normed + size_t(in.slot + begin) * widest, end - begin, in.n, p.from, p.to,
                               p.out + size_t(begin) * widest, widest, use);
            return;
        }
        Part parts[N];
        for (int i = 0; i < N; i++)
            parts[i] = {products[i].m.packed, products[i].from / ROWS, groups_of(products[i].to)};
        multiply_parts(parts, N, in.inputs, begin, end,
                       [&](int part, int group, int token, int count, const int32_t* found) {
            const Product& p = products[part];
            // Heads may begin inside a group; the rows outside are another thread's.
            const int first = std::max(p.from - group * ROWS, 0), last = std::min(ROWS, p.to - group * ROWS);
            float* place = p.out + size_t(token) * widest + group * ROWS;
            for (int t = 0; t < count; t++, place += widest) {
                const float scale = scales[in.slot + token + t] * p.m.scale;
                float values[ROWS];
                for (int r = 0; r < ROWS; r++) values[r] = float(found[t * ROWS + r]) * scale;
                if (last - first == ROWS)
                    for (int r = 0; r < ROWS; r++) use(place[r], values[r]);
                else
                    for (int r = first; r < last; r++) use(place[r], values[r]);
            }
        });
    }

    template <class Use>
    void multiply_dense(const Matrix& m, const float* in, int tokens, int inputs, int from, int to, float* out,
                        size_t stride, const Use& use) {
        thread_local std::vector<float> products;
        products.resize(tokens);
        for (int row = from; row < to; row++) {
            dense_dots_of(m, row, in, widest, tokens, inputs, products.data());
            for (int t = 0; t < tokens; t++) use(out[t * stride + row], products[t]);
        }
    }

    ONCE void rotate(float* head, int position) const {
        const int half = s.head_dim / 2;
        const float *c = cosine + size_t(position) * half, *n = sine + size_t(position) * half;
        for (int i = 0; i < half; i++) {
            const float a = head[i], b = head[i + half];
            head[i] = a * c[i] - b * n[i], head[i + half] = b * c[i] + a * n[i];
        }
    }

    // Of heads [from, to) that have keys.
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
                        const size_t at = size_t(next) * widest + g * p;
                        queries.push_back({q + at, attended + at, rows[next].position + 1});
                    }
                const size_t stride = round_up(rows[next - 1].position + 1, LANES);
                scores.resize(std::max(scores.size(), QUERIES * stride));
                attend<E>(*cache, cache_shape, index * s.kv_heads + h, queries.data(), int(queries.size()),
                          scores.data(), stride);
            }
    }

    // Heads are divided by groups that share keys, so that a thread, unless tokens are divided, reads only what it
    // wrote itself.
    template <class E>
    void attention_part(int index, const Row* rows, int count) {
        const Layer* l = &layers[index];
        const int p = s.head_dim, group = s.heads / s.kv_heads;
        const bool tokens_divided = by_tokens(count);
        divide({x, l->input_norm, s.hidden}, count, s.kv_heads, heads_unit,
               [=, this](const Entering& in, int from, int to, int first, int last) {
            multiply(
                {{l->q, from * group * p, to * group * p, q}, {l->k, from * p, to * p, k}, {l->v, from * p, to * p, v}},
                in, first, last, set);
            for (int t = first; t < last; t++) {
                for (int g = from * group; g < to * group; g++)
                    rotate(q + size_t(t) * widest + g * p, rows[t].position);
                for (int h = from; h < to; h++) {
                    float* key = k + size_t(t) * widest + h * p;
                    rotate(key, rows[t].position);
                    put<E>(*rows[t].cache, cache_shape, index * s.kv_heads + h, rows[t].position, key,
                           v + size_t(t) * widest + h * p);
                }
            }
            if (!tokens_divided) attend_heads<E>(from, to, index, rows, count);
        });
        if (tokens_divided)
            pool.divide(s.kv_heads, [=, this](int, auto& next) {
                for (int h; (h = next()) >= 0;) attend_heads<E>(h, h + 1, index, rows, count);
            });
        divide({attended, l->attn_norm, attention}, count, s.hidden, out_unit,
               [=, this](const Entering& in, int from, int to, int first, int last) {
            multiply({{l->o, from, to, x}}, in, first, last, add);
        });
    }

    void feed_forward_part(int index, int count) {
        const Layer* l = &layers[index];
        divide({x, l->post_norm, s.hidden}, count, s.ffn, ffn_unit,
               [=, this](const Entering& in, int from, int to, int first, int last) {
            multiply({{l->gate, from, to, gated}, {l->up, from, to, raised}}, in, first, last, set);
            for (int t = first; t < last; t++) {
                float *gate = gated + size_t(t) * widest, *up = raised + size_t(t) * widest;
                if (s.relu2)
                    for (int i = from; i < to; i++)
                        gate[i] = (gate[i] < 0 ? 0 : gate[i] * gate[i]) * up[i];  // a NaN stays one
                else
                    for (int i = from; i < to; i++) gate[i] = gate[i] / (1.0f + fast_exp(-gate[i])) * up[i];
            }
        });
        divide({gated, l->ffn_norm, s.ffn}, count, s.hidden, down_unit,
               [=, this](const Entering& in, int from, int to, int first, int last) {
            multiply({{l->down, from, to, x}}, in, first, last, add);
        });
    }

    // Final norm of a wanted row, to slot; and what an integer head takes.
    template <int BITS>
    ONCE void head_input(const float* in, int slot) {
        float* row = normed + size_t(slot) * widest;
        const float factor = 1.0f / std::sqrt(sum_of_squares(in, s.hidden) / float(s.hidden) + s.eps);
        for (int i = 0; i < s.hidden; i++) row[i] = in[i] * factor * w.norm[i];
        if constexpr (BITS < 32) head.take<BITS>(row, s.hidden, slot);
    }

    template <int BITS>
    void head_part(const std::vector<int>& wanted, float* logits) {
        const int count = int(wanted.size());
        pool.divide(count, [=, this, wanted = wanted.data()](int, auto& next) {
            for (int i; (i = next()) >= 0;) head_input<BITS>(x + size_t(wanted[i]) * widest, i);
        });
        if constexpr (BITS == 32)
            pool.divide((s.vocab + HEAD_PIECE - 1) / HEAD_PIECE, [=, this](int, auto& next) {
                for (int piece; (piece = next()) >= 0;)
                    multiply_dense(w.head, normed, count, s.hidden, piece * HEAD_PIECE,
                                   std::min(s.vocab, (piece + 1) * HEAD_PIECE), logits, s.vocab, set);
            });
        else head.logits<BITS>(w, s, pool, normed, widest, count, logits);
    }

    void embed(int token, float* out) const {
        const size_t at = size_t(token) * s.hidden;
        for (int i = 0; i < s.hidden; i++)
            out[i] = w.embedding.floats ? w.embedding.floats[at + i] : as_float(w.embedding.bfloats[at + i]);
    }

    // Throws std::bad_alloc where memory ends; the texts of the step are lost then, the engine is not.
    void step(const std::vector<Row>& rows, const std::vector<int>& wanted, float* logits) {
        const std::lock_guard<std::mutex> lock(turn);
        const int count = int(rows.size());
        reserve(count);
        if (s.head_bits < 32) head.begin(int(wanted.size()), s.vocab);
        int longest = 0;
        for (const Row& row : rows) longest = std::max(longest, row.position + 1);
        reserve_positions(longest);
        for (int t = count - 1; t >= 0; t--) rows[t].cache->grow(cache_shape, rows[t].position + 1);
        for (int t = 0; t < count; t++) embed(rows[t].token, x + size_t(t) * widest);
        for (int i = 0; i < s.layers; i++) {
            if (cache_shape.type == CACHE_INT8) attention_part<int8_t>(i, rows.data(), count);
            else if (cache_shape.type == CACHE_HALF) attention_part<float16>(i, rows.data(), count);
            else attention_part<float>(i, rows.data(), count);
            feed_forward_part(i, count);
        }
        if (s.head_bits == 4) head_part<4>(wanted, logits);
        else if (s.head_bits == 8) head_part<8>(wanted, logits);
        else head_part<32>(wanted, logits);
    }
};

}  // namespace
