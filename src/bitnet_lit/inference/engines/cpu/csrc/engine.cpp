// The engine's C interface: what native.py calls. What fails returns a status, 0 for done and 1 for memory that ended,
// or a null pointer: an exception that left here would end the process.
#include <chrono>
#include <numeric>

#include "engines.h"

namespace {

template <class Does>
int status_of(const Does& does) {
    try {
        does();
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}

template <class Makes>
auto made_by(const Makes& makes) -> decltype(makes()) {
    try {
        return makes();
    } catch (const std::exception&) {
        return nullptr;
    }
}

}  // namespace

extern "C" {

const char* bitnet_simd() { return SIMD_NAME; }

int64_t bitnet_packed_bytes(int rows, int inputs) { return int64_t(groups_of(rows)) * group_bytes(inputs); }

void bitnet_pack_codes(const int8_t* codes, int rows, int inputs, uint8_t* packed) {
    pack_codes(codes, rows, inputs, packed);
}
int bitnet_pack_folder(const uint8_t* stored, int rows, int inputs, uint8_t* packed) {
    return pack_folder(stored, rows, inputs, packed);
}
// Of the dense matrices below, one of the two pointers is not null.
void bitnet_pack_latent(const float* floats, const bfloat16* bfloats, int rows, int inputs, Rounding* by,
                        uint8_t* packed) {
    if (floats) pack_latent(floats, rows, inputs, *by, packed);
    else pack_latent(bfloats, rows, inputs, *by, packed);
}
int64_t bitnet_head_bytes(int bits, int vocab, int inputs) {
    return int64_t(head_groups_of(vocab)) * (bits == 8 ? head_group_bytes<8>(inputs) : head_group_bytes<4>(inputs));
}
int bitnet_quantize_head(int bits, const float* floats, const bfloat16* bfloats, int vocab, int inputs, uint8_t* codes,
                         HeadRows* rows, int8_t* fine) {
    const auto quantize = [&](const auto* weights) {
        if (bits == 8) quantize_head<8>(weights, vocab, inputs, codes, rows, fine);
        else quantize_head<4>(weights, vocab, inputs, codes, rows, fine);
    };
    return status_of([&] {
        if (floats) quantize(floats);
        else quantize(bfloats);
    });
}

// sum(codes * x) of every row and token; x is int8 (tokens, inputs), out int32 (tokens, rows). For tests.
void bitnet_multiply(const uint8_t* packed, int rows, int inputs, const int8_t* x, int tokens, int32_t* out) {
    const int stride = blocks_of(inputs) * BLOCK;
    Buffer<int8_t> in{size_t(readable(tokens)) * stride};
    std::vector<int32_t> sums(tokens);
    for (int t = 0; t < tokens; t++) {
        std::memcpy(in + size_t(t) * stride, x + size_t(t) * inputs, inputs);
        sums[t] = std::accumulate(in + size_t(t) * stride, in + size_t(t + 1) * stride, 0);
    }
    const Part part = {packed, 0, groups_of(rows)};
    multiply_parts(&part, 1, {in, size_t(stride), tokens, blocks_of(inputs), sums.data()}, 0, tokens,
                   [&](int, int group, int token, int count, const int32_t* products) {
        for (int t = 0; t < count; t++)
            for (int r = 0; r < ROWS && group * ROWS + r < rows; r++)
                out[size_t(token + t) * rows + group * ROWS + r] = products[t * ROWS + r];
    });
}

void* bitnet_new(const Shape* shape, const Layer* layers, const Weights* weights) {
    return made_by([&] { return Engines::all().add(std::make_unique<Engine>(*shape, layers, *weights)); });
}
void bitnet_free(void* engine) { Engines::all().remove((Engine*)engine); }

void* bitnet_cache_new() {
    return made_by([] { return new Cache; });
}
void bitnet_cache_free(void* cache) { delete (Cache*)cache; }
void* bitnet_cache_fork(void* engine, const void* cache) {
    return made_by([&] { return ((const Cache*)cache)->fork(((Engine*)engine)->cache_shape); });
}
void bitnet_cache_truncate(void* cache, int length) {
    ((Cache*)cache)->length = std::min(((Cache*)cache)->length, length);
}
int64_t bitnet_cache_bytes(void* engine, int positions) {  // read by a decode step
    const CacheShape& s = ((Engine*)engine)->cache_shape;
    const int64_t scales = s.scaled() ? 2 * sizeof(float) : 0;
    return int64_t(s.lanes) * positions * ((s.head_dim + s.width()) * int64_t(s.element()) + scales);
}

// `count` tokens; token i goes to the end of caches[i]. Logits of the rows named in `wanted`: float32 (n_wanted,
// vocab). Several threads may call it at once, each with caches of its own.
int bitnet_step(void* engine, int count, const int32_t* tokens, void* const* caches, int n_wanted,
                const int32_t* wanted, float* logits) {
    return status_of([&] {
        std::vector<Row> rows(count);
        for (int i = 0; i < count; i++) {
            Cache* cache = (Cache*)caches[i];
            rows[i] = {tokens[i], cache->length++, cache};
        }
        ((Engine*)engine)->step(rows, std::vector<int>(wanted, wanted + n_wanted), logits);
    });
}

// Bytes per second that `threads` threads read from memory together, each its own part of a buffer: the limit of a
// decode step, which reads every weight once.
double bitnet_read_bandwidth(int64_t bytes, int threads, int rounds) {
    Buffer<uint8_t> buffer{size_t(bytes)};
    std::memset(buffer, 1, size_t(bytes));  // pages nobody wrote to are all the same one
    Pool pool(threads);
    std::vector<int32_t> found(threads);
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < rounds; round++)
        pool.divide(threads, [&](int, auto& next) {
            for (int part; (part = next()) >= 0;) {
                const int64_t from = bytes * part / threads / 64 * 64, to = bytes * (part + 1) / threads / 64 * 64;
                simd::Sums sums = simd::zero();
                for (int64_t i = from; i < to; i += simd::W) {
                    simd::Sums some;
                    std::memcpy(&some, buffer + i, sizeof(some));
                    sums = simd::add(sums, some);
                }
                int32_t lanes[simd::W / 4];
                simd::store(lanes, sums);
                found[part] += lanes[0];
            }
        });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return found[0] == 1 ? 0.0 : double(bytes) * rounds / seconds.count();  // the sums must not be optimized away
}
}
