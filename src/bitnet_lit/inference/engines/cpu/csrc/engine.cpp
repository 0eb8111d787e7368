// The engine's C interface, which native.py calls. An exception that left a C function would end the process, so
// functions that can fail return a status or a null pointer.
#include <chrono>
#include <numeric>

#include "engine_registry.h"

namespace {

enum Status : int { DONE, NO_MEMORY, SHORT_READ };  // native.py has the same

template <class Work>
int status_of(const Work& work) {
    try {
        work();
        return DONE;
    } catch (const ShortRead&) {
        return SHORT_READ;
    } catch (const std::exception&) {  // bad_alloc; thread 0 gets what any thread throws
        return NO_MEMORY;
    }
}

template <class Make>
auto null_on_failure(const Make& make) -> decltype(make()) {
    try {
        return make();
    } catch (const std::exception&) {
        return nullptr;
    }
}

}  // namespace

extern "C" {

const char* bitnet_simd() { return SIMD_NAME; }

// Packing. `packed` has bitnet_packed_bytes(rows, inputs). A dense matrix is given by two pointers, of which one is
// null.
int64_t bitnet_packed_bytes(int rows, int inputs) { return int64_t(panels_of(rows)) * panel_bytes(inputs); }
int bitnet_pack_codes(const int8_t* codes, int rows, int inputs, uint8_t* packed) {
    return status_of([&] { pack_codes(codes, rows, inputs, packed); });
}
int bitnet_pack_folder(const uint8_t* stored, int rows, int inputs, uint8_t* packed, int* all_are_codes) {
    return status_of([&] { *all_are_codes = pack_folder(stored, rows, inputs, packed); });
}
int bitnet_pack_latent(const float* floats, const bfloat16* bfloats, int rows, int inputs, Rounding* by,
                       uint8_t* packed) {
    return status_of([&] {
        if (floats) pack_latent(floats, rows, inputs, *by, packed);
        else pack_latent(bfloats, rows, inputs, *by, packed);
    });
}

// The output head: `codes` has bitnet_head_bytes, all zero.
int64_t bitnet_head_bytes(int bits, int vocab, int inputs) {
    return int64_t(head_panels_of(vocab)) * (bits == 8 ? head_panel_bytes<8>(inputs) : head_panel_bytes<4>(inputs));
}
int bitnet_quantize_head(int bits, const float* floats, const bfloat16* bfloats, int vocab, int inputs, uint8_t* codes,
                         HeadPanel* panels, int8_t* int8_rows) {
    const auto quantize = [&](const auto* weights) {
        if (bits == 8) quantize_head<8>(weights, vocab, inputs, codes, panels, int8_rows);
        else quantize_head<4>(weights, vocab, inputs, codes, panels, int8_rows);
    };
    return status_of([&] {
        if (floats) quantize(floats);
        else quantize(bfloats);
    });
}

// sum(code * x) of every row and token; x is int8 (tokens, inputs), out int32 (tokens, rows). For tests.
int bitnet_multiply(const uint8_t* packed, int rows, int inputs, const int8_t* x, int tokens, int32_t* out) {
    return status_of([&] {
        const int stride = blocks_of(inputs) * BLOCK_INPUTS;
        Buffer<int8_t> in{size_t(readable_tokens(tokens)) * stride};
        std::vector<int32_t> sums(tokens);
        for (int t = 0; t < tokens; t++) {
            std::memcpy(in + size_t(t) * stride, x + size_t(t) * inputs, inputs);
            sums[t] = std::accumulate(in + size_t(t) * stride, in + size_t(t + 1) * stride, 0);
        }
        const PanelRange range = {packed, 0, panels_of(rows)};
        ternary_matmul(&range, 1, {in, size_t(stride), tokens, blocks_of(inputs), sums.data()}, 0, tokens,
                       [&](int, int panel, int token, int count, const int32_t* products) {
            for (int t = 0; t < count; t++)
                for (int r = 0; r < PANEL_ROWS && panel * PANEL_ROWS + r < rows; r++)
                    out[size_t(token + t) * rows + panel * PANEL_ROWS + r] = products[t * PANEL_ROWS + r];
        });
    });
}

void* bitnet_new(const Shape* shape, const Layer* layers, const Weights* weights) {
    return null_on_failure(
        [&] { return EngineRegistry::instance().add(std::make_unique<Engine>(*shape, layers, *weights)); });
}
void bitnet_free(void* engine) { EngineRegistry::instance().remove((Engine*)engine); }

void* bitnet_cache_new() {
    return null_on_failure([] { return new Cache; });
}
void bitnet_cache_free(void* cache) { delete (Cache*)cache; }
void* bitnet_cache_fork(void* engine, const void* cache) {
    return null_on_failure([&] { return ((const Cache*)cache)->fork(((Engine*)engine)->cache_shape); });
}
void bitnet_cache_truncate(void* cache, int length) {
    ((Cache*)cache)->length = std::min(((Cache*)cache)->length, length);
}
// Bytes of keys and values that a decode step reads after `positions` tokens.
int64_t bitnet_cache_bytes(void* engine, int positions) {
    const CacheShape& s = ((Engine*)engine)->cache_shape;
    const int64_t scales = s.scaled() ? 2 * sizeof(float) : 0;
    return int64_t(s.kv_heads) * positions * ((s.head_dim + s.width()) * int64_t(s.element()) + scales);
}

// A step of `count` tokens; token i goes to the end of caches[i]. Writes the logits of the rows named in `wanted`,
// float32 (n_wanted, vocab). Several threads may call it at once, each with caches of its own.
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

// Bytes per second that `threads` threads read from memory together, each its own part of a buffer. It is the limit of
// a decode step, which reads every weight once.
double bitnet_read_bandwidth(int64_t bytes, int threads, int rounds) {
    double rate = -1;
    status_of([&] {
        Buffer<uint8_t> buffer{size_t(bytes)};
        std::memset(buffer, 1, size_t(bytes));  // pages that nobody wrote to are all the same page of zeros
        ThreadPool pool(threads);
        std::vector<int32_t> found(threads);
        const auto start = std::chrono::steady_clock::now();
        for (int round = 0; round < rounds; round++)
            pool.parallel_for(threads, [&](int, auto& next_chunk) {
                for (int part; (part = next_chunk()) >= 0;) {
                    const int64_t from = bytes * part / threads / 64 * 64, to = bytes * (part + 1) / threads / 64 * 64;
                    simd::Int32Vec sums = simd::zero();
                    for (int64_t i = from; i < to; i += simd::WIDTH) {
                        simd::Int32Vec some;
                        std::memcpy(&some, buffer + i, sizeof(some));
                        sums = simd::add(sums, some);
                    }
                    int32_t lanes[simd::WIDTH / 4];
                    simd::store(lanes, sums);
                    found[part] += lanes[0];
                }
            });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        if (found[0] != 1) rate = double(bytes) * rounds / seconds.count();  // the sums must not be optimized away
    });
    return rate;
}
}
