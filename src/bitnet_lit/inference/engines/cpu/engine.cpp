// The whole step of a BitNet decoder: embedding, norms, int8 activations, ternary products, rotary positions, attention on
// the cache, output head. No Python and no dispatch between two tokens.
//
// A step takes rows (token, sequence, position). One prompt is many rows of one sequence, a batch is one row of each of
// many sequences; both share one pass over the weights. Threads divide heads in the attention and rows of the matrices
// elsewhere, and meet four times a layer.
//
// The mathematics is that of model/layers.py and quant/functional.py: the integers are equal, float sums run in another
// order.
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels.h"
#include "threads.h"

extern "C" {

struct Shape {
    int32_t hidden, layers, heads, kv_heads, head_dim, ffn, vocab, context, relu2, sub_norm, head_int8, threads;
    float eps, rope_theta;
};

struct Linear {
    const uint8_t* packed;
    float scale;
};

struct Layer {
    const float *input_norm, *attn_norm, *post_norm, *ffn_norm;
    Linear q, k, v, o, gate, up, down;
};

struct Weights {
    const float* embedding;  // (vocab, hidden)
    const float* norm;
    const float* head;         // (vocab, hidden) float32
    const int8_t* head_codes;  // (vocab, padded hidden) int8, where head_int8
    const float* head_scales;  // (vocab)
};
}

namespace {

constexpr int ALIGN = 64;

template <class T>
struct Buffer {  // aligned, zeroed
    T* data = nullptr;
    explicit Buffer(size_t count = 0) { reset(count); }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    void reset(size_t count) {
        std::free(data);
        const size_t bytes = (count * sizeof(T) + ALIGN - 1) / ALIGN * ALIGN;
        data = bytes ? (T*)std::aligned_alloc(ALIGN, bytes) : nullptr;
        if (data) std::memset((void*)data, 0, bytes);
    }
    operator T*() const { return data; }
};

// Inlined in two places, the compiler may order a sum in two ways; one token must not differ from one of many.
#define ONCE __attribute__((noinline))

int padded(int inputs) { return (inputs + 63) / 64 * 64; }  // whole vectors of every width

// exp to 2e-7 relative, in a form that compilers turn into vector code: 2^n times a polynomial of the fraction.
inline float fast_exp(float x) {
    x = std::min(88.0f, std::max(-87.0f, x)) * 1.44269504f;
    const float n = std::floor(x + 0.5f), f = (x - n) * 0.693147181f;
    const float p =
        1.0f + f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (8.33333e-3f + f * 1.388889e-3f)))));
    union { int32_t i; float f; } two = {(int32_t(n) + 127) << 23};
    return two.f * p;
}

ONCE float sum_of_squares(const float* x, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

inline float dot(const float* __restrict a, const float* __restrict b, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// What becomes of a product: functions of their own types, so that the loops around them are compiled with them.
constexpr auto set = [](float& place, float value) { place = value; };
constexpr auto add = [](float& place, float value) { place += value; };
constexpr auto times = [](float& place, float value) { place *= value; };

// One sequence's keys and values: (layers, kv_heads, room, head_dim), room doubling up to the context.
struct Cache {
    int length = 0, room = 0;
    std::unique_ptr<Buffer<float>> keys, values;
};

struct Row {
    int32_t token, position;
    Cache* cache;
};

struct Engine {
    Shape s;
    std::vector<Layer> layers;
    Weights w;
    Pool pool;
    int hidden_pad, attention, attention_pad, ffn_pad, widest;
    // of all rows of a step
    Buffer<float> x, q, k, v, attended, gated;
    Buffer<int8_t> codes, high, low;
    Buffer<float> scales;
    std::vector<int32_t> sums;
    std::vector<int64_t> head_sums;
    Buffer<float> head_scales, noise, bounds;
    Buffer<float> cosine, sine;  // (context, head_dim / 2)
    int capacity = 0;

    Engine(const Shape& shape, const Layer* l, const Weights& weights)
        : s(shape), layers(l, l + shape.layers), w(weights), pool(shape.threads) {
        hidden_pad = padded(s.hidden), attention = s.heads * s.head_dim, attention_pad = padded(attention);
        ffn_pad = padded(s.ffn), widest = std::max({hidden_pad, attention_pad, ffn_pad});
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
        x.reset(size_t(rows) * s.hidden), q.reset(size_t(rows) * attention), attended.reset(size_t(rows) * attention);
        k.reset(size_t(rows) * s.kv_heads * s.head_dim), v.reset(size_t(rows) * s.kv_heads * s.head_dim);
        gated.reset(size_t(rows) * s.ffn);
        // One token's codes are made by every thread for itself: cheaper than a barrier.
        const size_t copies = std::max(rows, s.threads);
        codes.reset(copies * widest), scales.reset(copies), sums.assign(copies, 0);
        high.reset(size_t(rows) * hidden_pad), low.reset(size_t(rows) * hidden_pad);
        head_scales.reset(rows), noise.reset(rows), bounds.reset(size_t(rows) * s.threads), head_sums.assign(rows, 0);
    }

    void grow(Cache& cache, int length) {
        if (length <= cache.room) return;
        const int room = std::min(std::max({length, 2 * cache.room, 256}), s.context);
        const size_t lanes = size_t(s.layers) * s.kv_heads, old = size_t(cache.room) * s.head_dim,
                     now = size_t(room) * s.head_dim;
        for (auto* part : {&cache.keys, &cache.values}) {
            auto bigger = std::make_unique<Buffer<float>>(lanes * now);
            for (size_t lane = 0; lane < lanes && old; lane++)
                std::memcpy(*bigger + lane * now, **part + lane * old, old * sizeof(float));
            *part = std::move(bigger);
        }
        cache.room = room;
    }

    // Norm (or none) and rounding to int8 of one token; `quantize_activations` of quant/functional.py.
    ONCE void quantize(const float* in, const float* norm, int n, int slot) {
        int8_t* out = codes + size_t(slot) * widest;
        thread_local std::vector<float> normed;
        normed.resize(n);
        const float* value = in;
        if (norm) {
            const float factor = 1.0f / std::sqrt(sum_of_squares(in, n) / float(n) + s.eps);
            for (int i = 0; i < n; i++) normed[i] = in[i] * factor * norm[i];
            value = normed.data();
        }
        float largest = 0;
#pragma omp simd reduction(max : largest)
        for (int i = 0; i < n; i++) largest = std::max(largest, std::fabs(value[i]));
        largest = std::max(largest, 1e-5f);
        const float factor = 127.0f / largest;
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < n; i++) {
            const int32_t code = int32_t(std::nearbyint(value[i] * factor));
            out[i] = int8_t(code), sum += code;
        }
        std::memset(out + n, 0, size_t(padded(n) - n));
        scales[slot] = largest / 127.0f, sums[slot] = sum;
    }

    // All rows to codes; returns the slot of row 0 as this thread reads it.
    int quantize_rows(int thread, int rows, const float* in, size_t stride, const float* norm, int n) {
        if (rows == 1) return quantize(in, norm, n, thread), thread;
        for (int r = thread; r < rows; r += pool.count) quantize(in + r * stride, norm, n, r);
        pool.barrier();
        return 0;
    }

    // Rows [from, to) of a matrix times all tokens; use(place, value) gets each value and where it belongs in an output of
    // `stride` floats a token.
    template <class Use>
    void multiply(const Linear& m, int slot, int tokens, int inputs, int from, int to, float* out, size_t stride,
                  const Use& use) {
        const int blocks = blocks_of(inputs);
        const int8_t* in = codes + size_t(slot) * widest;
        thread_local std::vector<int32_t> products;
        products.resize(size_t(tokens) * ROWS);
        for (int group = from / ROWS; group * ROWS < to; group++) {
            group_dots(m.packed + group * group_bytes(inputs), in, widest, tokens, blocks, products.data());
            // Heads may begin inside a group; the rows outside are another thread's.
            const int first = std::max(from - group * ROWS, 0), last = std::min(ROWS, to - group * ROWS);
            float* place = out + group * ROWS;
            for (int t = 0; t < tokens; t++, place += stride) {
                const float scale = scales[slot + t] * m.scale;
                const int32_t sum = sums[slot + t];
                float values[ROWS];
                for (int r = 0; r < ROWS; r++) values[r] = float(products[t * ROWS + r] - sum) * scale;
                if (last - first == ROWS)
                    for (int r = 0; r < ROWS; r++) use(place[r], values[r]);
                else
                    for (int r = first; r < last; r++) use(place[r], values[r]);
            }
        }
    }
    // A share of `count` things, in units: [from, to) for this thread.
    std::pair<int, int> share(int thread, int count, int unit) const {
        const int units = (count + unit - 1) / unit;
        const int from = units * thread / pool.count * unit, to = units * (thread + 1) / pool.count * unit;
        return {std::min(from, count), std::min(to, count)};
    }

    ONCE void rotate(float* head, int position) const {
        const int half = s.head_dim / 2;
        const float *c = cosine + size_t(position) * half, *n = sine + size_t(position) * half;
        for (int i = 0; i < half; i++) {
            const float a = head[i], b = head[i + half];
            head[i] = a * c[i] - b * n[i], head[i + half] = b * c[i] + a * n[i];
        }
    }

    ONCE void attend(const Row& row, const float* query, const float* __restrict keys, const float* __restrict values,
                float* __restrict out) const {
        const int n = row.position + 1, p = s.head_dim;
        const float scale = 1.0f / std::sqrt(float(p));
        thread_local std::vector<float> score;
        score.resize(n);
        float largest = -INFINITY, sum = 0;
        for (int j = 0; j < n; j++) {
            score[j] = dot(query, keys + size_t(j) * p, p) * scale;
            largest = std::max(largest, score[j]);
        }
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < n; j++) score[j] = fast_exp(score[j] - largest), sum += score[j];
        for (int i = 0; i < p; i++) out[i] = 0;
        for (int j = 0; j < n; j++) {
            const float weight = score[j];
            const float* value = values + size_t(j) * p;
            for (int i = 0; i < p; i++) out[i] += weight * value[i];
        }
        for (int i = 0; i < p; i++) out[i] /= sum;
    }

    // Heads are divided by groups that share keys, so that a thread reads only what it wrote itself.
    void attention_part(int thread, int index, const Row* rows, int count) {
        const Layer& l = layers[index];
        const int p = s.head_dim, group = s.heads / s.kv_heads;
        const int slot = quantize_rows(thread, count, x, s.hidden, l.input_norm, s.hidden);
        const auto [from, to] = share(thread, s.kv_heads, 1);
        multiply(l.q, slot, count, s.hidden, from * group * p, to * group * p, q, attention, set);
        const int kv = s.kv_heads * p;
        multiply(l.k, slot, count, s.hidden, from * p, to * p, k, kv, set);
        multiply(l.v, slot, count, s.hidden, from * p, to * p, v, kv, set);
        for (int t = 0; t < count; t++)
            for (int h = from; h < to; h++) {
                const Cache& cache = *rows[t].cache;
                const size_t at = ((size_t(index) * s.kv_heads + h) * cache.room + rows[t].position) * p;
                std::memcpy(*cache.keys + at, k + size_t(t) * kv + h * p, size_t(p) * sizeof(float));
                std::memcpy(*cache.values + at, v + size_t(t) * kv + h * p, size_t(p) * sizeof(float));
                rotate(*cache.keys + at, rows[t].position);
            }
        for (int h = from; h < to; h++)
            for (int t = 0; t < count; t++) {
                const size_t lane = (size_t(index) * s.kv_heads + h) * rows[t].cache->room * p;
                for (int g = h * group; g < (h + 1) * group; g++) {
                    float* query = q + size_t(t) * attention + g * p;
                    rotate(query, rows[t].position);
                    attend(rows[t], query, *rows[t].cache->keys + lane, *rows[t].cache->values + lane,
                           attended + size_t(t) * attention + g * p);
                }
            }
        pool.barrier();
        const int slot_o = quantize_rows(thread, count, attended, attention, l.attn_norm, attention);
        const auto [first, last] = share(thread, s.hidden, ROWS);
        multiply(l.o, slot_o, count, attention, first, last, x, s.hidden, add);
        pool.barrier();
    }

    void feed_forward_part(int thread, int index, int count) {
        const Layer& l = layers[index];
        const int slot = quantize_rows(thread, count, x, s.hidden, l.post_norm, s.hidden);
        const auto [from, to] = share(thread, s.ffn, ROWS);
        multiply(l.gate, slot, count, s.hidden, from, to, gated, s.ffn, set);
        for (int t = 0; t < count; t++) {
            float* gate = gated + size_t(t) * s.ffn;
            if (s.relu2)
                for (int i = from; i < to; i++) gate[i] = gate[i] > 0 ? gate[i] * gate[i] : 0;
            else
                for (int i = from; i < to; i++) gate[i] = gate[i] / (1.0f + fast_exp(-gate[i]));
        }
        multiply(l.up, slot, count, s.hidden, from, to, gated, s.ffn, times);
        pool.barrier();
        const int slot_down = quantize_rows(thread, count, gated, s.ffn, l.ffn_norm, s.ffn);
        const auto [first, last] = share(thread, s.hidden, ROWS);
        multiply(l.down, slot_down, count, s.ffn, first, last, x, s.hidden, add);
        pool.barrier();
    }

    // Final norm, and 16-bit activations as two bytes where the head is int8.
    ONCE void head_input(float* row, int slot) {
        const float factor = 1.0f / std::sqrt(sum_of_squares(row, s.hidden) / float(s.hidden) + s.eps);
        float largest = 1e-5f;
        for (int i = 0; i < s.hidden; i++) {
            row[i] *= factor * w.norm[i];
            largest = std::max(largest, std::fabs(row[i]));
        }
        if (!s.head_int8) return;
        const float to_codes = 32000.0f / largest;  // below 127 * 256 + 127
        int64_t sum = 0;
        int8_t *h = high + size_t(slot) * hidden_pad, *l = low + size_t(slot) * hidden_pad;
        for (int i = 0; i < s.hidden; i++) {
            const int32_t code = int32_t(std::nearbyint(row[i] * to_codes)), top = (code + 128) >> 8;
            h[i] = int8_t(top), l[i] = int8_t(code - 256 * top), sum += code;
        }
        head_scales[slot] = largest / 32000.0f, head_sums[slot] = sum;
        noise[slot] = 6.0f * std::sqrt(sum_of_squares(row, s.hidden) / 12.0f);
    }

    void head_part(int thread, const std::vector<int>& wanted, float* logits) {
        for (size_t i = thread; i < wanted.size(); i += pool.count) head_input(x + size_t(wanted[i]) * s.hidden, int(i));
        pool.barrier();
        const auto [from, to] = share(thread, s.vocab, 16);
        for (int v = from; v < to; v++)
            for (size_t i = 0; i < wanted.size(); i++)
                logits[i * s.vocab + v] =
                    s.head_int8 ? float(head_dot(w.head_codes + size_t(v) * hidden_pad, high + i * hidden_pad,
                                                 low + i * hidden_pad, hidden_pad, head_sums[i])) *
                                      (head_scales[int(i)] * w.head_scales[v])
                                : exact_logit(v, wanted[i]);
        if (!s.head_int8) return;
        // Whatever could be the likeliest token but for the rounding of the head's rows gets its exact logit. The rounding
        // of a row is noise of its scale / sqrt(12) for each input: six of its deviations on either side.
        for (size_t i = 0; i < wanted.size(); i++) {
            const float* row = logits + i * s.vocab;
            float bound = -INFINITY;
#pragma omp simd reduction(max : bound)
            for (int v = from; v < to; v++) bound = std::max(bound, row[v] - noise[i] * w.head_scales[v]);
            bounds[i * pool.count + thread] = bound;
        }
        pool.barrier();
        for (size_t i = 0; i < wanted.size(); i++) {
            float* row = logits + i * s.vocab;
            const float bound = *std::max_element(&bounds[i * pool.count], &bounds[i * pool.count] + pool.count);
            for (int v = from; v < to; v++)
                if (row[v] + noise[i] * w.head_scales[v] >= bound) row[v] = exact_logit(v, wanted[i]);
        }
    }

    ONCE float exact_logit(int token, int row) const {
        return dot(w.head + size_t(token) * s.hidden, x + size_t(row) * s.hidden, s.hidden);
    }

    void step(const std::vector<Row>& rows, const std::vector<int>& wanted, float* logits) {
        const int count = int(rows.size());
        reserve(count);
        for (int t = count - 1; t >= 0; t--) grow(*rows[t].cache, rows[t].position + 1);
        for (int t = 0; t < count; t++)
            std::memcpy(x + size_t(t) * s.hidden, w.embedding + size_t(rows[t].token) * s.hidden,
                        size_t(s.hidden) * sizeof(float));
        pool.run([&](int thread) {
            for (int i = 0; i < s.layers; i++) {
                attention_part(thread, i, rows.data(), count);
                feed_forward_part(thread, i, count);
            }
            head_part(thread, wanted, logits);
        });
    }
};

}  // namespace

extern "C" {

const char* bitnet_simd() { return SIMD_NAME; }

int64_t bitnet_packed_bytes(int rows, int inputs) { return int64_t(groups_of(rows)) * group_bytes(inputs); }

void bitnet_pack(const int8_t* codes, int rows, int inputs, uint8_t* packed) { pack_ternary(codes, rows, inputs, packed); }

// sum(codes * x) of every row and token; x is int8 (tokens, inputs padded to blocks), out int32 (tokens, rows). For tests.
void bitnet_multiply(const uint8_t* packed, int rows, int inputs, const int8_t* x, int tokens, int32_t* out) {
    const int stride = padded(inputs);
    std::vector<int32_t> part(size_t(tokens) * ROWS);
    for (int group = 0; group < groups_of(rows); group++) {
        group_dots(packed + group * group_bytes(inputs), x, stride, tokens, blocks_of(inputs), part.data());
        for (int t = 0; t < tokens; t++) {
            int32_t sum = 0;
            for (int i = 0; i < stride; i++) sum += x[size_t(t) * stride + i];
            for (int r = 0; r < ROWS && group * ROWS + r < rows; r++)
                out[size_t(t) * rows + group * ROWS + r] = part[t * ROWS + r] - sum;
        }
    }
}

void* bitnet_new(const Shape* shape, const Layer* layers, const Weights* weights) {
    return new Engine(*shape, layers, *weights);
}
void bitnet_free(void* engine) { delete (Engine*)engine; }

void* bitnet_cache_new() { return new Cache; }
void bitnet_cache_free(void* cache) { delete (Cache*)cache; }
void bitnet_cache_truncate(void* cache, int length) { ((Cache*)cache)->length = std::min(((Cache*)cache)->length, length); }

// `count` tokens; token i goes to the end of caches[i]. Logits of the rows named in `wanted`: float32 (n_wanted, vocab).
void bitnet_step(void* engine, int count, const int32_t* tokens, void* const* caches, int n_wanted, const int32_t* wanted,
                 float* logits) {
    std::vector<Row> rows(count);
    for (int i = 0; i < count; i++) {
        Cache* cache = (Cache*)caches[i];
        rows[i] = {tokens[i], cache->length++, cache};
    }
    ((Engine*)engine)->step(rows, std::vector<int>(wanted, wanted + n_wanted), logits);
}

// Bytes per second that `threads` threads read from memory together, each its own part of a buffer: the limit of a decode
// step, which reads every weight once.
double bitnet_read_bandwidth(int64_t bytes, int threads, int rounds) {
    Buffer<uint8_t> buffer{size_t(bytes)};
    Pool pool(threads);
    std::vector<int32_t> found(threads);
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < rounds; round++)
        pool.run([&](int thread) {
            const int64_t from = bytes * thread / threads / 64 * 64, to = bytes * (thread + 1) / threads / 64 * 64;
            simd::Sums sums = simd::zero();
            for (int64_t i = from; i < to; i += simd::W) {
                simd::Sums part;
                std::memcpy(&part, buffer + i, sizeof(part));
                sums = simd::add(sums, part);
            }
            found[thread] += simd::total(sums);
        });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return found[0] == 1 ? 0.0 : double(bytes) * rounds / seconds.count();  // the sums must not be optimized away
}
}
