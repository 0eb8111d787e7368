// The whole step of a decoder: embedding, norms, int8 activations, ternary products, rotary positions, attention on the
// cache, output head. No Python and no dispatch between two tokens.
//
// A step takes rows (token, sequence, position). One prompt is many rows of one sequence, a batch is one row of each of
// many sequences; both share one pass over the weights. Threads divide heads in the attention, elsewhere rows of the matrices
// or, where there are many, tokens; they meet four or five times a layer.
//
// The mathematics is that of model/layers.py and quant/functional.py: the integers are equal, float sums run in another
// order. A dense model runs with float products in place of the integer ones.
#pragma once

#include "attention.h"
#include "logits.h"
#include "products.h"

namespace {

// What becomes of a product: functions of their own types, so that the loops around them are compiled with them.
constexpr auto set = [](float& place, float value) { place = value; };
constexpr auto add = [](float& place, float value) { place += value; };

struct Row {
    int32_t token, position;
    Cache* cache;
};

enum Phase { HEADS, OUT, FFN, DOWN, PHASES };
constexpr int HEAD_PIECE = 8 * HEAD_GROUP;  // rows of the output head
constexpr size_t PIECE_BYTES = 8192;

struct Engine {
    Shape s;
    CacheShape cache_shape;
    std::vector<Layer> layers;
    Weights w;
    Pool pool;
    Phases phases;  // of every layer those below, and the head
    int attention;
    int units[PHASES];  // heads or rows of a piece
    int widest;  // numbers from one token to the next in all that follows
    // of all rows of a step
    Buffer<float> x, q, k, v, attended, gated, raised, normed;
    Buffer<int8_t> codes;
    Buffer<float> scales;
    std::vector<int32_t> sums;
    IntegerHead head;
    Buffer<float> cosine, sine;  // (context, head_dim / 2)
    int capacity = 0;

    Engine(const Shape& shape, const Layer* l, const Weights& weights)
        : s(shape), cache_shape{s.layers * s.kv_heads, s.head_dim, s.context, CacheType(s.cache_type)},
          layers(l, l + shape.layers), w(weights), pool(shape.threads), phases(PHASES * s.layers + 1, s.threads) {
        attention = s.heads * s.head_dim;
        const int whole = ROWS / std::gcd(ROWS, s.head_dim);  // heads that fill groups of rows
        units[HEADS] = s.kv_heads / whole >= s.threads ? whole : 1;
        units[OUT] = piece_rows(s.hidden, attention), units[FFN] = piece_rows(s.ffn, s.hidden), units[DOWN] = piece_rows(s.hidden, s.ffn);
        widest = std::max({padded(s.hidden), padded(attention), padded(s.ffn)}) + 64;  // not 4 KiB: those would share sets of the caches
        const int half = s.head_dim / 2;
        cosine.reset(size_t(s.context) * half), sine.reset(size_t(s.context) * half);
        for (int p = 0; p < s.context; p++)
            for (int i = 0; i < half; i++) {
                const float angle = float(p) * (1.0f / std::pow(s.rope_theta, float(2 * i) / float(s.head_dim)));
                cosine[size_t(p) * half + i] = std::cos(angle), sine[size_t(p) * half + i] = std::sin(angle);
            }
    }

    void reserve(int rows) {
        if (rows <= capacity) return;
        capacity = rows;
        for (auto* buffer : {&x, &q, &k, &v, &attended, &gated, &raised}) buffer->reset(size_t(rows) * widest);
        // One token's codes are made by every thread for itself: cheaper than a barrier.
        const size_t copies = std::max(rows, s.threads);
        normed.reset(copies * widest);
        codes.reset(size_t(readable(int(copies))) * widest), scales.reset(copies), sums.assign(copies, 0);
        if (s.head_bits < 32) head.reserve(rows, s.threads, s.hidden);
    }

    // What enters a projection: the norm (or none) of one token, and of a BitNet its rounding to int8,
    // `quantize_activations` of quant/functional.py.
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
            const int32_t code = int32_t(std::nearbyint(value[i] * factor));
            out[i] = int8_t(code), sum += code;
        }
        std::memset(out + n, 0, size_t(blocks_of(n)) * BLOCK - n);
        scales[slot] = largest / 127.0f, sums[slot] = sum;
    }

    struct Entering { int slot, n; Inputs inputs; };  // all rows as a thread multiplies them; row 0 is in `slot`

    Entering prepare_rows(int thread, int rows, const float* in, const float* norm, int n) {
        const int slot = rows == 1 ? thread : 0;
        if (rows == 1) prepare(in, norm, n, slot);
        for (int r = thread; rows > 1 && r < rows; r += pool.count) prepare(in + size_t(r) * widest, norm, n, r);
        if (rows > 1) pool.barrier();
        return {slot, n, {codes + size_t(slot) * widest, size_t(widest), s.dense ? 0 : rows, blocks_of(n), &sums[slot]}};
    }

    // A share of `count` things, in units: [from, to) for this thread.
    std::pair<int, int> share(int thread, int count, int unit) const {
        const int units = (count + unit - 1) / unit;
        const int from = units * thread / pool.count * unit, to = units * (thread + 1) / pool.count * unit;
        return {std::min(from, count), std::min(to, count)};
    }

    // Whether products are divided by tokens rather than by rows: a table of lookup.h then serves all rows.
    bool by_tokens(int tokens) const {
        if (!LOOKS_UP || s.dense || tokens < LOOKUP_TOKENS) return false;
        int most = 0;
        for (int thread = 0; thread < pool.count; thread++) {
            const auto [from, to] = share(thread, tokens, LOOKUP_TOKENS);
            most = std::max(most, to - from);
        }
        return most * pool.count <= tokens * 9 / 8;
    }

    static int phase_of(int layer, Phase phase) { return layer * PHASES + phase; }
    // Rows of a piece: so many that taking it costs little beside its product, but four for each thread where there are.
    int piece_rows(int rows, int inputs) const {
        const int worth = int(PIECE_BYTES / group_bytes(inputs)), enough = groups_of(rows) / (4 * pool.count);
        return ROWS * std::max(1, std::min(worth, enough));
    }
    void set_phases() {
        const auto pieces = [](int count, int unit) { return (count + unit - 1) / unit; };
        for (int i = 0; i < s.layers; i++) {
            phases.set(phase_of(i, HEADS), pieces(s.kv_heads, units[HEADS]));
            phases.set(phase_of(i, OUT), pieces(s.hidden, units[OUT])), phases.set(phase_of(i, DOWN), pieces(s.hidden, units[DOWN]));
            phases.set(phase_of(i, FFN), pieces(s.ffn, units[FFN]));
        }
        phases.set(s.layers * PHASES, pieces(s.vocab, HEAD_PIECE));
    }

    // A phase of a step: does(from, to, first, last), rows (or heads) [from, to) for the tokens [first, last), until all is done.
    template <class Does>
    void divide(int phase, int thread, int tokens, int rows, int unit, const Does& does) {
        if (tokens <= FEW_TOKENS) {
            for (int piece; (piece = phases.take(phase, thread)) >= 0;) does(piece * unit, std::min(rows, (piece + 1) * unit), 0, tokens);
        } else if (by_tokens(tokens)) {
            const auto [first, last] = share(thread, tokens, LOOKUP_TOKENS);
            does(0, rows, first, last);
        } else {
            const auto [from, to] = share(thread, rows, unit);
            does(from, to, 0, tokens);
        }
    }

    struct Product { const Matrix& m; int from, to; float* out; };  // rows [from, to) of a matrix, and where they go

    // Rows of matrices with the same inputs times the tokens [begin, end); use(place, value) gets each value and where it
    // belongs.
    template <int N, class Use>
    void multiply(const Product (&products)[N], const Entering& in, int begin, int end, const Use& use) {
        if (s.dense) {
            for (const Product& p : products)
                multiply_dense(p.m, normed + size_t(in.slot + begin) * widest, end - begin, in.n, p.from, p.to,
                               p.out + size_t(begin) * widest, widest, use);
            return;
        }
        Part parts[N];
        for (int i = 0; i < N; i++) parts[i] = {products[i].m.packed, products[i].from / ROWS, groups_of(products[i].to)};
        multiply_parts(parts, N, in.inputs, begin, end, [&](int part, int group, int token, int count, const int32_t* found) {
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
                attend<E>(*cache, cache_shape, index * s.kv_heads + h, queries.data(), int(queries.size()), scores.data(), stride);
            }
    }

    // Heads are divided by groups that share keys, so that a thread, unless tokens are divided, reads only what it wrote itself.
    template <class E>
    void attention_part(int thread, int index, const Row* rows, int count) {
        const Layer& l = layers[index];
        const int p = s.head_dim, group = s.heads / s.kv_heads;
        const Entering in = prepare_rows(thread, count, x, l.input_norm, s.hidden);
        divide(phase_of(index, HEADS), thread, count, s.kv_heads, units[HEADS], [&](int from, int to, int first, int last) {
            multiply({{l.q, from * group * p, to * group * p, q}, {l.k, from * p, to * p, k}, {l.v, from * p, to * p, v}}, in, first, last, set);
            for (int t = first; t < last; t++) {
                for (int g = from * group; g < to * group; g++) rotate(q + size_t(t) * widest + g * p, rows[t].position);
                for (int h = from; h < to; h++) {
                    float* key = k + size_t(t) * widest + h * p;
                    rotate(key, rows[t].position);
                    put<E>(*rows[t].cache, cache_shape, index * s.kv_heads + h, rows[t].position, key, v + size_t(t) * widest + h * p);
                }
            }
            if (!by_tokens(count)) attend_heads<E>(from, to, index, rows, count);
        });
        if (by_tokens(count)) {
            pool.barrier();
            const auto [from, to] = share(thread, s.kv_heads, 1);
            attend_heads<E>(from, to, index, rows, count);
        }
        pool.barrier();
        const Entering out = prepare_rows(thread, count, attended, l.attn_norm, attention);
        divide(phase_of(index, OUT), thread, count, s.hidden, units[OUT], [&](int from, int to, int first, int last) {
            multiply({{l.o, from, to, x}}, out, first, last, add);
        });
        pool.barrier();
    }

    void feed_forward_part(int thread, int index, int count) {
        const Layer& l = layers[index];
        const Entering in = prepare_rows(thread, count, x, l.post_norm, s.hidden);
        divide(phase_of(index, FFN), thread, count, s.ffn, units[FFN], [&](int from, int to, int first, int last) {
            multiply({{l.gate, from, to, gated}, {l.up, from, to, raised}}, in, first, last, set);
            for (int t = first; t < last; t++) {
                float *gate = gated + size_t(t) * widest, *up = raised + size_t(t) * widest;
                if (s.relu2)
                    for (int i = from; i < to; i++) gate[i] = (gate[i] > 0 ? gate[i] * gate[i] : 0) * up[i];
                else
                    for (int i = from; i < to; i++) gate[i] = gate[i] / (1.0f + fast_exp(-gate[i])) * up[i];
            }
        });
        pool.barrier();
        const Entering down = prepare_rows(thread, count, gated, l.ffn_norm, s.ffn);
        divide(phase_of(index, DOWN), thread, count, s.hidden, units[DOWN], [&](int from, int to, int first, int last) {
            multiply({{l.down, from, to, x}}, down, first, last, add);
        });
        pool.barrier();
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
    void head_part(int thread, const std::vector<int>& wanted, float* logits) {
        const int count = int(wanted.size());
        for (int i = thread; i < count; i += pool.count) head_input<BITS>(x + size_t(wanted[i]) * widest, i);
        pool.barrier();
        const auto pieces = [&](const auto& does) {
            for (int piece; (piece = phases.take(s.layers * PHASES, thread)) >= 0;)
                does(piece * HEAD_PIECE, std::min(s.vocab, (piece + 1) * HEAD_PIECE));
        };
        if constexpr (BITS == 32) {
            pieces([&](int from, int to) { multiply_dense(w.head, normed, count, s.hidden, from, to, logits, s.vocab, set); });
        } else {
            const auto [from, to] = share(thread, s.vocab, HEAD_GROUP);
            head.logits<BITS>(w, s, pool, thread, normed, widest, count, pieces, from, to, logits);
        }
    }

    void embed(int token, float* out) const {
        const size_t at = size_t(token) * s.hidden;
        for (int i = 0; i < s.hidden; i++)
            out[i] = w.embedding.floats ? w.embedding.floats[at + i] : as_float(w.embedding.bfloats[at + i]);
    }

    void step(const std::vector<Row>& rows, const std::vector<int>& wanted, float* logits) {
        const int count = int(rows.size());
        reserve(count);
        if (s.head_bits < 32) head.begin(int(wanted.size()), s.vocab);
        for (int t = count - 1; t >= 0; t--) rows[t].cache->grow(cache_shape, rows[t].position + 1);
        for (int t = 0; t < count; t++) embed(rows[t].token, x + size_t(t) * widest);
        set_phases();
        pool.run([&](int thread) {
            for (int i = 0; i < s.layers; i++) {
                if (cache_shape.type == CACHE_INT8) attention_part<int8_t>(thread, i, rows.data(), count);
                else if (cache_shape.type == CACHE_HALF) attention_part<float16>(thread, i, rows.data(), count);
                else attention_part<float>(thread, i, rows.data(), count);
                feed_forward_part(thread, i, count);
            }
            if (s.head_bits == 4) head_part<4>(thread, wanted, logits);
            else if (s.head_bits == 8) head_part<8>(thread, wanted, logits);
            else head_part<32>(thread, wanted, logits);
        });
    }
};

}  // namespace
