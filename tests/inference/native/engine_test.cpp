// The native engine against plain loops: compiled by test_native.py for several processors and with sanitizers.
//
// Every kernel at sizes that are no multiple of anything, then whole steps: a model of random weights must give the
// same bits for a token alone and among others, for one thread and three, for one caller and several at once, and after
// a fork. Weights that are no numbers give logits that are none. Prints what was wrong and returns 1.
#include <sys/wait.h>
#include <unistd.h>

#include <bit>
#include <cstdio>
#include <random>
#include <string>
#include <utility>

#include "engine_registry.h"

namespace {

std::mt19937 random_bits(1);
int uniform(int from, int to) { return std::uniform_int_distribution<int>(from, to)(random_bits); }
float normal() { return std::normal_distribution<float>()(random_bits); }
int failures = 0;

#define CHECK(condition, ...) \
    if (!(condition))         \
    failures++, std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition), std::printf(__VA_ARGS__), std::printf("\n")

template <class T>
std::vector<T> filled(size_t n, auto value) {
    std::vector<T> v(n);
    for (auto& x : v) x = T(value());
    return v;
}

std::vector<uint8_t> packed_codes(const std::vector<int8_t>& codes, int rows, int inputs) {
    std::vector<uint8_t> packed(panels_of(rows) * panel_bytes(inputs));
    pack_codes(codes.data(), rows, inputs, packed.data());
    return packed;
}

// The examples in the comments of packed_2bit.h and packed_5bit.h.
void worked_examples() {
#if defined(SIMD_LOOKUP)
    std::vector<int8_t> codes(BLOCK_INPUTS);
    codes[0] = 1, codes[8] = -1, codes[16] = 1;   // triple 0: +7
    codes[1] = 1, codes[9] = -1, codes[17] = -1;  // triple 1: -11
    const auto packed = packed_codes(codes, 1, BLOCK_INPUTS);
    CHECK(packed[byte_of_row(0)] == (11 << 4 | 7), "magnitudes %d", packed[byte_of_row(0)]);
    CHECK(packed[128 + byte_of_row(0)] == 1 << 6, "signs %d", packed[128 + byte_of_row(0)]);
#else
    const std::vector<int8_t> codes{1, 0, -1, 0, 0, 1, 1, 0, -1, -1, 0, 1, 0, 0, 0, 1};
    const auto packed = packed_codes(codes, 1, BLOCK_INPUTS);
    CHECK(packed[0] == 0b01'00'01'10 && packed[1] == 0b01'00'10'01, "bytes %d %d", packed[0], packed[1]);
#endif
}

// Two matrices with the same inputs, the first from its second panel on; many tokens of many rows go through
// lookup_matmul.h.
void ternary_products(int some_rows, int inputs, int tokens, bool extremes) {
    const int rows[2] = {PANEL_ROWS + some_rows, uniform(1, 40)}, stride = blocks_of(inputs) * BLOCK_INPUTS;
    std::vector<int8_t> x(size_t(readable_tokens(tokens)) * stride), codes[2];
    std::vector<uint8_t> packed[2];
    for (int i = 0; i < 2; i++) {
        codes[i] = filled<int8_t>(size_t(rows[i]) * inputs, [&] { return uniform(-1, 1); });
        packed[i] = packed_codes(codes[i], rows[i], inputs);
    }
    for (int t = 0; t < tokens; t++)  // the largest sums that there are, of a row with itself, or the smallest
        for (int i = 0; i < inputs; i++) {
            const int largest = (t % 2 ? -127 : 127) * codes[0][size_t(PANEL_ROWS + t % some_rows) * inputs + i];
            x[size_t(t) * stride + i] = int8_t(extremes ? largest : uniform(-127, 127));
        }
    std::vector<int32_t> sums(tokens);
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < inputs; i++) sums[t] += x[size_t(t) * stride + i];
    const PanelRange parts[] = {{packed[0].data(), 1, panels_of(rows[0])}, {packed[1].data(), 0, panels_of(rows[1])}};
    int seen = 0;
    ternary_matmul(parts, 2, {x.data(), size_t(stride), tokens, blocks_of(inputs), sums.data()}, 0, tokens,
                   [&](int part, int panel, int first, int count, const int32_t* products) {
        for (int t = 0; t < count; t++)
            for (int r = panel * PANEL_ROWS; r < std::min(rows[part], (panel + 1) * PANEL_ROWS); r++, seen++) {
                int32_t expected = 0;
                for (int i = 0; i < inputs; i++)
                    expected += codes[part][size_t(r) * inputs + i] * x[size_t(first + t) * stride + i];
                CHECK(products[t * PANEL_ROWS + r % PANEL_ROWS] == expected, "part %d row %d inputs %d tokens %d", part,
                      r, inputs, tokens);
            }
    });
    CHECK(seen == (some_rows + rows[1]) * tokens, "%d products", seen);
}

template <int BITS>
void head(int vocab, int inputs, int tokens) {
    const auto weights = filled<float>(size_t(vocab) * inputs, normal);
    std::vector<uint8_t> codes(head_panels_of(vocab) * head_panel_bytes<BITS>(inputs));
    std::vector<HeadPanel> rows(head_panels_of(vocab));
    std::vector<int8_t> int8_rows(size_t(vocab) * padded(inputs));
    quantize_head<BITS>(weights.data(), vocab, inputs, codes.data(), rows.data(), int8_rows.data());
    const auto x = filled<float>(size_t(tokens) * inputs, normal);
    const size_t pad = padded(inputs);
    std::vector<uint8_t> halves(2 * tokens * pad);
    std::vector<int16_t> int12_x(tokens * pad);
    std::vector<HeadInput> in(tokens);
    for (int t = 0; t < tokens; t++) {
        in[t] = {&halves[2 * t * pad], &halves[(2 * t + 1) * pad], 0, 0, 0, &int12_x[t * pad], 0};
        quantize_head_input<BITS>(&x[size_t(t) * inputs], inputs, in[t]);
    }
    std::vector<float> logits(size_t(tokens) * vocab);
    std::vector<PanelBounds> bounds(tokens);
    for (int g = 0; g < head_panels_of(vocab); g++) {
        const int count = std::min(HEAD_PANEL_ROWS, vocab - g * HEAD_PANEL_ROWS);
        head_logits<BITS>(codes.data() + g * head_panel_bytes<BITS>(inputs), rows[g], count, count, in.data(), tokens,
                          quads_of(inputs), &logits[g * HEAD_PANEL_ROWS], vocab, bounds.data(), 1);
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < count; r++) {
                const int v = g * HEAD_PANEL_ROWS + r;
                double exact = 0, size = 0;
                for (int i = 0; i < inputs; i++) {
                    const double product = double(weights[size_t(v) * inputs + i]) * x[size_t(t) * inputs + i];
                    exact += product, size += std::abs(product);
                }
                const float found = logits[size_t(t) * vocab + v], margin = in[t].margin * rows[g].scale[r];
                const float slack = 1e-6f * (std::abs(found) + margin);  // the same sum may be rounded once or twice
                CHECK(std::abs(found - exact) <= margin, "%g and %g, margin %g", double(found), exact, double(margin));
                CHECK(found <= bounds[t].best && found + margin <= bounds[t].upper + slack &&
                          found - margin <= bounds[t].lower + slack,
                      "row %d", v);
                if constexpr (BITS == 4) {
                    const float scale = rows[g].scale[r] * 7 / 127 * in[t].int12_scale;
                    const double finer = double(int8_int12_dot(&int8_rows[v * pad], in[t].int12, inputs)) * scale;
                    // Half a step of the largest weight and of the largest activation, at every input.
                    CHECK(std::abs(finer - exact) <=
                              inputs * (rows[g].scale[r] * 7 / 254 * 5 + in[t].int12_scale * 3) + 1e-5 * size,
                          "%g and %g", finer, exact);
                }
            }
    }
}

template <class E>
void attention(CacheType type, int head_dim, int length, int queries, double tolerance) {
    const CacheShape shape{2, head_dim, length, type};
    Cache cache;
    cache.grow(shape, (length + 1) / 2), cache.length = (length + 1) / 2;  // and moves what it holds as it grows
    std::vector<std::vector<float>> keys, values;
    for (int j = 0; j < length; j++) {
        keys.push_back(filled<float>(head_dim, normal)), values.push_back(filled<float>(head_dim, normal));
        if (j >= cache.room) cache.grow(shape, j + 1);
        store_kv<E>(cache, shape, 1, j, keys[j].data(), values[j].data());
    }
    const auto q = filled<float>(size_t(queries) * head_dim, normal);
    std::vector<float> out(size_t(queries) * head_dim), alone(head_dim);
    const size_t stride = round_up(length, LANES);
    std::vector<float> scores(TILE_QUERIES * stride);
    std::vector<Query> list;
    for (int i = 0; i < queries; i++)
        list.push_back({&q[size_t(i) * head_dim], &out[size_t(i) * head_dim], std::max(1, length - i)});
    attend<E>(cache, shape, 1, list.data(), queries, scores.data(), stride);
    for (int i = 0; i < queries; i++) {
        const int n = list[i].length;
        Query single{list[i].q, alone.data(), n};
        attend<E>(cache, shape, 1, &single, 1, scores.data(), stride);
        CHECK(std::equal(alone.begin(), alone.end(), list[i].out), "head_dim %d length %d query %d", head_dim, n, i);
        std::vector<double> weights, expected(head_dim);
        double total = 0;
        for (int j = 0; j < n; j++) {
            double dot = 0;
            for (int d = 0; d < head_dim; d++) dot += double(list[i].q[d]) * keys[j][d];
            weights.push_back(std::exp(dot / std::sqrt(double(head_dim)))), total += weights.back();
        }
        for (int d = 0; d < head_dim; d++) {
            for (int j = 0; j < n; j++) expected[d] += weights[j] / total * values[j][d];
            CHECK(std::abs(expected[d] - list[i].out[d]) < tolerance, "%g and %g", expected[d], double(list[i].out[d]));
        }
    }
}

void dense(int inputs, int tokens) {
    const auto w = filled<float>(inputs, normal), x = filled<float>(size_t(tokens) * inputs, normal);
    std::vector<bfloat16> halves;
    for (float value : w) halves.push_back({uint16_t(std::bit_cast<uint32_t>(value) >> 16)});
    std::vector<float> out(tokens), single(1);
    const auto check = [&](const auto* weights) {
        dense_row_dot(weights, x.data(), inputs, tokens, inputs, out.data());
        for (int t = 0; t < tokens; t++) {
            double expected = 0;
            for (int i = 0; i < inputs; i++) expected += double(as_float(weights[i])) * x[size_t(t) * inputs + i];
            CHECK(std::abs(out[t] - expected) < 1e-5 * inputs, "%g and %g", double(out[t]), expected);
            dense_row_dot(weights, &x[size_t(t) * inputs], inputs, 1, inputs, single.data());
            CHECK(single[0] == out[t], "inputs %d", inputs);
        }
    };
    check(w.data()), check(halves.data());
}

void exponentials() {
    for (float x = -100; x < 90; x += 0.0371f) {
        const double exact = std::exp(double(std::min(88.0f, std::max(-87.0f, x))));
        CHECK(std::abs(fast_exp(x) / exact - 1) < 1e-5, "exp(%g) = %g", double(x),
              double(fast_exp(x)));  // the argument's own rounding: 127 * 2^-24
    }
}

struct RandomModel {
    Shape shape;
    std::vector<std::vector<uint8_t>> packed;
    std::vector<std::vector<float>> floats, of_values;
    std::vector<Layer> layers;
    Weights weights{};
    std::vector<uint8_t> head_codes;
    std::vector<int8_t> head_int8_rows;
    std::vector<HeadPanel> head_panels;

    explicit RandomModel(const Shape& s) : shape(s) {
        const int q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
        for (int i = 0; i < s.layers; i++)
            layers.push_back({i % 2 ? nullptr : value_weights(s.kv_heads * std::min(VALUE_GATE_INPUTS, s.hidden)),
                              i % 2 ? norm(1) : nullptr, i % 3 ? nullptr : norm(1), norm(s.hidden),
                              i % 2 ? nullptr : norm(s.head_dim), i % 2 ? nullptr : norm(s.head_dim), norm(q),
                              norm(s.hidden), norm(s.ffn), RowTable{value_weights(s.vocab * kv), 0, -1, 0},
                              matrix(q, s.hidden), matrix(kv, s.hidden), matrix(kv, s.hidden), matrix(s.hidden, q),
                              matrix(s.ffn, s.hidden), matrix(s.ffn, s.hidden), matrix(s.hidden, s.ffn)});
        weights.norm = norm(s.hidden);
        floats.push_back(filled<float>(size_t(s.vocab) * s.hidden, normal));
        weights.head = {nullptr, floats.back().data(), nullptr, 1};
        weights.embedding = weights.head_rows = {floats.back().data(), 0, -1, 0};
        head_codes.resize(head_panels_of(s.vocab) * head_panel_bytes<8>(s.hidden)),
            head_panels.resize(head_panels_of(s.vocab));
        head_int8_rows.resize(size_t(s.vocab) * padded(s.hidden));
        const auto quantize = [&]<int BITS>() {
            quantize_head<BITS>(floats.back().data(), s.vocab, s.hidden, head_codes.data(), head_panels.data(),
                                head_int8_rows.data());
        };
        if (s.head_bits == 4) quantize.operator()<4>();
        else quantize.operator()<8>();
        weights.head_codes = head_codes.data(), weights.head_panels = head_panels.data(),
        weights.head_int8_rows = head_int8_rows.data();
    }
    const float* value_weights(int n) { return of_values.emplace_back(filled<float>(n, normal)).data(); }
    const float* norm(int n) {
        return floats.emplace_back(filled<float>(n, [] { return 1 + 0.1f * normal(); })).data();
    }
    Matrix matrix(int rows, int inputs) {
        if (shape.dense)
            return {nullptr,
                    floats.emplace_back(filled<float>(size_t(rows) * inputs, [] { return 0.1f * normal(); })).data(),
                    nullptr, 1};
        const auto codes = filled<int8_t>(size_t(rows) * inputs, [] { return uniform(-1, 1); });
        return {packed.emplace_back(packed_codes(codes, rows, inputs)).data(), nullptr, nullptr, 0.05f};
    }
    std::unique_ptr<Engine> engine(int threads) const {
        Shape s = shape;
        s.threads = threads;
        return std::make_unique<Engine>(s, layers.data(), weights);
    }
    std::vector<float> logits(int threads, int texts, int length, int at_once) const {
        return logits_of(*engine(threads), texts, length, at_once);
    }
    // Logits of the tokens of several texts, `at_once` tokens of each in a step.
    static std::vector<float> logits_of(Engine& engine, int texts, int length, int at_once) {
        const Shape& s = engine.s;
        std::vector<Cache> caches(texts);
        std::vector<float> out(size_t(texts) * length * s.vocab);
        for (int start = 0; start < length; start += at_once) {
            std::vector<Row> rows;
            std::vector<int> wanted;
            for (int text = 0; text < texts; text++)
                for (int i = start; i < std::min(length, start + at_once); i++) {
                    wanted.push_back(int(rows.size()));
                    rows.push_back({(7 * text + 3 * i) % s.vocab, caches[text].length++, &caches[text]});
                }
            std::vector<float> part(wanted.size() * s.vocab);
            engine.step(rows, wanted, part.data());
            for (size_t r = 0; r < rows.size(); r++) {
                const size_t text = r / (rows.size() / texts), i = rows[r].position;
                std::copy_n(&part[r * s.vocab], s.vocab, &out[(text * length + i) * s.vocab]);
            }
        }
        return out;
    }
};

void steps(const Shape& shape, int length) {
    const RandomModel model(shape);
    const auto expected = model.logits(1, 2, length, 1);
    CHECK(std::all_of(expected.begin(), expected.end(), [](float x) { return std::isfinite(x); }), "not finite");
    for (int threads : {1, 2, 3})
        for (int at_once : {1, 5, length})
            CHECK(model.logits(threads, 2, length, at_once) == expected, "threads %d at_once %d", threads, at_once);
}

// Rows whose logits nobody wants: the first part of a long prompt, all texts of a batch but one.
void unwanted_rows(const Shape& shape, int length) {
    const RandomModel model(shape);
    const auto expected = model.logits(1, 2, length, 1);
    const auto engine = model.engine(2);
    std::vector<Cache> caches(2);
    std::vector<float> logits(shape.vocab);
    const auto step = [&](int from, int to, const std::vector<int>& wanted) {
        std::vector<Row> rows;
        for (int text = 0; text < 2; text++)
            for (int i = from; i < to; i++)
                rows.push_back({(7 * text + 3 * i) % shape.vocab, caches[text].length++, &caches[text]});
        engine->step(rows, wanted, logits.data());
    };
    step(0, length / 2, {});
    for (int i = length / 2; i < length; i++) {
        step(i, i + 1, {i % 2});
        CHECK(std::equal(logits.begin(), logits.end(), &expected[size_t(i % 2 * length + i) * shape.vocab]), "row %d",
              i);
    }
}

// Tables of which a step reads rows, in memory or from an open file: the same logits, and an exception where the file
// is cut.
template <class E>
void row_tables(const Shape& shape, int length) {
    RandomModel model(shape);
    std::vector<E> rows;
    for (float& value : model.floats.back()) {
        const uint32_t bits = std::bit_cast<uint32_t>(value) >> 16 << 16;  // a number that both types hold
        value = std::bit_cast<float>(bits);
        if constexpr (sizeof(E) == 2) rows.push_back({uint16_t(bits >> 16)});
        else rows.push_back(value);
    }
    const auto expected = model.logits(1, 2, length, 5);
    model.weights.embedding = model.weights.head_rows = {rows.data(), 0, -1, sizeof(E) == 2};
    CHECK(model.logits(2, 2, length, 5) == expected, "%zu bytes, in memory", sizeof(E));
    FILE* file = std::tmpfile();
    const std::string before(17, 'x');  // a file may begin its numbers at any address
    const off_t bytes = before.size() + rows.size() * sizeof(E);
    const auto write_file = [&] {
        CHECK(pwrite(fileno(file), before.data(), before.size(), 0) == ssize_t(before.size()) &&
                  pwrite(fileno(file), rows.data(), rows.size() * sizeof(E), before.size()) > 0,
              "cannot write");
    };
    write_file();
    model.weights.embedding = model.weights.head_rows = {nullptr, int64_t(before.size()), fileno(file), sizeof(E) == 2};
    const auto engine = model.engine(2);
    CHECK(RandomModel::logits_of(*engine, 2, length, 5) == expected, "%zu bytes", sizeof(E));
    CHECK(ftruncate(fileno(file), bytes / 2) == 0, "cannot cut");
    bool thrown = false;
    try {
        RandomModel::logits_of(*engine, 2, length, 5);
    } catch (const ShortRead&) {
        thrown = true;
    }
    CHECK(thrown, "%zu bytes", sizeof(E));
    write_file();
    CHECK(RandomModel::logits_of(*engine, 2, length, 5) == expected, "%zu bytes, again", sizeof(E));
    std::fclose(file);
}

// Several callers of one engine at once, each with texts of its own.
void callers(const Shape& shape, int length) {
    const RandomModel model(shape);
    const auto expected = model.logits(1, 2, length, 1);
    for (int threads : {1, 2, 3}) {
        const auto engine = model.engine(threads);
        std::vector<std::thread> callers;
        std::vector<std::vector<float>> found(4);
        for (int i = 0; i < 4; i++)
            callers.emplace_back([&, i] { found[i] = RandomModel::logits_of(*engine, 2, length, i % 2 ? length : 1); });
        for (auto& caller : callers) caller.join();
        for (const auto& logits : found) CHECK(logits == expected, "threads %d", threads);
    }
}

// The child of a fork, which happens while others are at steps: its engines work, and can be given back.
[[maybe_unused]] void forks(const Shape& shape, int length) {
    const RandomModel model(shape);
    const auto expected = model.logits(1, 2, length, 1);
    Engine* engine = EngineRegistry::instance().add(model.engine(3));
    std::atomic<bool> ended{false};
    std::thread other([&] {
        while (!ended) CHECK(RandomModel::logits_of(*engine, 2, length, 1) == expected, "beside a fork");
    });
    for (int i = 0; i < 3; i++) {
        const pid_t child = fork();
        if (!child) {
            alarm(60);  // rather than wait for ever
            const bool equal = RandomModel::logits_of(*engine, 2, length, 1) == expected;
            EngineRegistry::instance().remove(engine);
            _exit(!equal);
        }
        int status = -1;
        waitpid(child, &status, 0);
        CHECK(status == 0, "a child ended with %d", status);
    }
    ended = true;
    other.join();
    EngineRegistry::instance().remove(engine);
}

// One weight that is no number: so are the logits, whichever weight it is, and nothing undefined happens on the way.
void damaged(const Shape& shape) {
    for (size_t which = 0;; which++) {
        RandomModel model(shape);
        if (which == model.floats.size() - 1) break;  // the embedding, which only some tokens meet
        for (float value : {NAN, INFINITY}) {
            if (std::isinf(value) && shape.relu2) continue;  // minus infinity is zero there
            model.floats[which][model.floats[which].size() / 2] = value;
            const auto logits = model.logits(1, 2, 9, 9);
            CHECK(std::none_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); }),
                  "floats %zu, %g", which, double(value));
        }
    }
    if (!shape.dense) {
        RandomModel model(shape);
        for (Matrix Layer::* matrix :
             {&Layer::q, &Layer::k, &Layer::v, &Layer::o, &Layer::gate, &Layer::up, &Layer::down}) {
            const float scale = std::exchange((model.layers[0].*matrix).scale, NAN);
            const auto logits = model.logits(1, 2, 9, 9);
            CHECK(std::none_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); }), "a scale");
            (model.layers[0].*matrix).scale = scale;
        }
    }
}

// A head with one row that is no number: that row's logit is none.
template <int BITS>
void damaged_head(int vocab, int inputs) {
    auto weights = filled<float>(size_t(vocab) * inputs, normal);
    weights[size_t(vocab / 2) * inputs + inputs / 3] = NAN;
    std::vector<uint8_t> codes(head_panels_of(vocab) * head_panel_bytes<BITS>(inputs));
    std::vector<HeadPanel> rows(head_panels_of(vocab));
    std::vector<int8_t> int8_rows(size_t(vocab) * padded(inputs));
    quantize_head<BITS>(weights.data(), vocab, inputs, codes.data(), rows.data(), int8_rows.data());
    for (int r = 0; r < vocab; r++)
        CHECK(std::isnan(rows[r / HEAD_PANEL_ROWS].scale[r % HEAD_PANEL_ROWS]) == (r == vocab / 2), "row %d", r);
}

// A chunk is done once, by however many workers; what one throws arrives, once; a loop may follow at once or
// after a rest.
void pools() {
    for (int threads : {1, 2, 5, 40}) {  // more than there are processors, too
        ThreadPool pool(threads);
        for (int round = 0; round < 300; round++) {
            const int chunks = round % 40;
            std::vector<int> done(chunks);
            pool.parallel_for(chunks, [&](int, auto& next_chunk) {
                for (int chunk; (chunk = next_chunk()) >= 0;) done[chunk]++;
            });
            CHECK(std::all_of(done.begin(), done.end(), [](int n) { return n == 1; }), "threads %d", threads);
            if (round % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(5));  // workers fall asleep
        }
        for (int round = 0; round < 20; round++) {
            bool thrown = false;
            try {
                pool.parallel_for(50, [](int, auto& next) {
                    while (next() >= 0) throw std::bad_alloc();
                });
            } catch (const std::bad_alloc&) {
                thrown = true;
            }
            std::atomic<int> done{0};
            pool.parallel_for(50, [counts = &done](int, auto& next) {  // throws nothing, whatever workers threw before
                while (next() >= 0) ++*counts;
            });
            CHECK(thrown && done == 50, "threads %d", threads);
        }
    }
}

}  // namespace

int main() {
    worked_examples();
    for (bool extremes : {false, true}) {
        for (int inputs : {1, 3, 16, 31, 64, 96, 300, 1000, 2048})
            for (int tokens : {1, 2, 3, 4, 5, 7, 16, 17, 70})
                ternary_products(uniform(1, 40), inputs, tokens, extremes);
        for (int inputs : {1, 31, 64, 300, 1000})
            for (int tokens : {15, 31, 32, 70}) ternary_products(uniform(500, 520), inputs, tokens, extremes);
        ternary_products(20, 13000, 3, extremes);  // runs of blocks
    }
    for (int inputs : {1, 5, 64, 100, 700, 9000})
        for (int tokens : {1, 2, 3, 5, 9}) {
            head<8>(uniform(1, 50), inputs, tokens), head<4>(uniform(1, 50), inputs, tokens);
            dense(inputs, tokens);
        }
    for (int head_dim : {2, 18, 32, 64, 96})
        for (int length : {1, 7, 16, 33, 150})
            for (int queries : {1, 4, 6}) {
                // 2^-12 of a key or value of up to four; 1/254 of the same; and what that makes of the scores.
                attention<float>(CACHE_FLOAT, head_dim, length, queries, 1e-5);
                attention<float16>(CACHE_HALF, head_dim, length, queries, 5e-3);
                attention<int8_t>(CACHE_INT8, head_dim, length, queries, 1e-1);
            }
    exponentials();
    for (int type : {CACHE_FLOAT, CACHE_HALF, CACHE_INT8})
        for (int dense : {0, 1})
            for (int head_bits : {4, 8, 32})
                steps({48, 2, 3, type == CACHE_HALF ? 3 : 1, 18, 100, 77, 30, 77, type == CACHE_FLOAT, dense, head_bits,
                       type, 1, 1e-5f, 1e4f},
                      23);
    // So many rows and tokens that tokens are divided rather than rows, evenly (two threads) or not.
    steps({48, 2, 3, 3, 18, 300, 77, 40, 77, 0, 0, 8, CACHE_HALF, 1, 1e-5f, 1e4f}, 33);
    for (int head_bits : {4, 8, 32})
        unwanted_rows({48, 2, 3, 1, 18, 100, 77, 30, 77, 0, 0, head_bits, CACHE_HALF, 1, 1e-5f, 1e4f}, 23);
    for (int head_bits : {4, 8}) {
        const Shape shape{48, 2, 3, 1, 18, 100, 77, 30, 77, 0, 0, head_bits, CACHE_HALF, 1, 1e-5f, 1e4f};
        row_tables<float>(shape, 23), row_tables<bfloat16>(shape, 23);
    }
    callers({48, 2, 3, 1, 18, 100, 77, 30, 77, 0, 0, 8, CACHE_HALF, 1, 1e-5f, 1e4f}, 23);
    callers({48, 2, 3, 3, 18, 300, 77, 40, 77, 0, 0, 4, CACHE_INT8, 1, 1e-5f, 1e4f}, 33);
#if !defined(__SANITIZE_THREAD__) && !defined(EMULATED)  // neither follows a child that starts threads
    forks({48, 2, 3, 1, 18, 100, 77, 30, 77, 0, 0, 8, CACHE_HALF, 1, 1e-5f, 1e4f}, 23);
#endif
    for (int type : {CACHE_FLOAT, CACHE_HALF, CACHE_INT8})
        for (int dense : {0, 1})
            for (int head_bits : {4, 8, 32})
                damaged(
                    {48, 2, 3, 1, 18, 100, 77, 30, 77, type == CACHE_FLOAT, dense, head_bits, type, 1, 1e-5f, 1e4f});
    damaged_head<4>(50, 70), damaged_head<8>(50, 70);
    pools();
    std::printf("%s: %d failures\n", SIMD_NAME, failures);
    return failures != 0;
}
