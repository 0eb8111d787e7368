// Products of packed weights and int8 activations, of one token or of many.
#pragma once

#include <vector>

#include "packing.h"

constexpr int FEW_TOKENS =
    16;  // and fewer: a decode step; with triples.h as fast as lookup.h, which always makes tables for 32

#if defined(SIMD_LOOKUP)
#include "lookup.h"
constexpr bool LOOKS_UP = true;
#else
constexpr bool LOOKS_UP = false;
constexpr int LOOKUP_TOKENS = 1;
#endif

inline int readable(int tokens) {
    return round_up(tokens, LOOKUP_TOKENS);
}  // tokens that are read where there are so many

// Tokens that enter a product; the thread that made it uses it, before it makes the next.
struct Inputs {
    const int8_t* x;  // a token `stride` after the other, padded with zeros to whole blocks
    size_t stride;
    int blocks;
    const int32_t* sums;  // of each token's x
#if defined(SIMD_LOOKUP)
    const TripleSums* triples = nullptr;  // of few tokens
#endif

    Inputs(const int8_t* x, size_t stride, [[maybe_unused]] int tokens, int blocks, const int32_t* sums)
        : x(x), stride(stride), blocks(blocks), sums(sums) {
#if defined(SIMD_LOOKUP)
        if (tokens > FEW_TOKENS) return;
        thread_local Buffer<TripleSums> made;
        const size_t each = size_t(blocks) * TRIPLES;
        if (made.bytes < tokens * each * sizeof(TripleSums)) made.reset(tokens * each);
        for (int t = 0; t < tokens; t++) sum_triples(x + t * stride, blocks, made + t * each);
        triples = made;
#endif
    }
};

// The tokens [first, last) times the groups of parts of the same inputs. use(part, group, token, count, products) gets
// sum(code * x) of `count` tokens from `token` on, [token * ROWS + row].
template <class Use>
inline void multiply_parts(const Part* parts, int count, const Inputs& in, int first, int last, const Use& use) {
    const auto groups = [&](const auto& each) {
        for (int i = 0; i < count; i++)
            for (int group = parts[i].first; group < parts[i].last; group++)
                each(i, group, parts[i].packed + size_t(group) * in.blocks * BLOCK_BYTES);
    };
    thread_local std::vector<int32_t> products;
    const int tokens = last - first;
    products.resize(std::max(products.size(), size_t(tokens) * ROWS));
#if defined(SIMD_LOOKUP)
    if (in.triples)
        return groups([&](int part, int group, const uint8_t* w) {
            group_dots(w, in.triples + size_t(first) * in.blocks * TRIPLES, tokens, in.blocks, products.data());
            use(part, group, first, tokens, products.data());
        });
    for (; first < last; first += LOOKUP_TOKENS)
        lookup_products(parts, count, in.x + size_t(first) * in.stride, in.stride, in.blocks,
                        [&](int part, int group, const int32_t* found) {
            use(part, group, first, std::min(LOOKUP_TOKENS, last - first), found);
        });
#else
    groups([&](int part, int group, const uint8_t* w) {
        group_dots(w, in.x + size_t(first) * in.stride, in.stride, tokens, in.blocks, products.data());
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < ROWS; r++) products[t * ROWS + r] -= in.sums[first + t];
        use(part, group, first, tokens, products.data());
    });
#endif
}
