// Products of packed ternary weights with int8 activations, of one token or of many: chooses the kernel.
//
//     processor                  few tokens                      many tokens
//     AVX-512 VNNI, NEON, other  packed_2bit.h                   packed_2bit.h, unpacked first
//     AVX2                       packed_5bit.h (triple tables)   lookup_matmul.h (tables of 32 tokens)
//
// Every product is exact: int32 sums of int8 activations times codes of -1, 0 and +1.
#pragma once

#include <vector>

#include "packing.h"

// Up to this many tokens, tables of triples are as fast as lookup_matmul.h, which always works on 32 tokens.
constexpr int FEW_TOKENS = 16;

#if defined(SIMD_LOOKUP)
#include "lookup_matmul.h"
constexpr bool HAS_LOOKUP = true;
#else
constexpr bool HAS_LOOKUP = false;
constexpr int LOOKUP_TOKENS = 1;
#endif

// Tokens that the kernels may read: memory for activations must have room for so many.
inline int readable_tokens(int tokens) { return round_up(tokens, LOOKUP_TOKENS); }

// The int8 activations of some tokens as a product takes them. With AVX2 and few tokens it also builds their tables, in
// memory of the thread: one thread uses one TokenCodes before it makes the next.
struct TokenCodes {
    const int8_t* x;  // zeros beyond the inputs up to whole blocks
    size_t stride;    // bytes from one token to the next
    int blocks;
    const int32_t* sums;  // sum(x) of each token
#if defined(SIMD_LOOKUP)
    const TripleTable* triples = nullptr;  // null for many tokens
#endif

    TokenCodes(const int8_t* x, size_t stride, [[maybe_unused]] int tokens, int blocks, const int32_t* sums)
        : x(x), stride(stride), blocks(blocks), sums(sums) {
#if defined(SIMD_LOOKUP)
        if (tokens > FEW_TOKENS) return;
        thread_local Buffer<TripleTable> tables;
        const size_t each = size_t(blocks) * TRIPLES;
        if (tables.bytes < tokens * each * sizeof(TripleTable)) tables.reset(tokens * each);
        for (int t = 0; t < tokens; t++) build_triple_tables(x + t * stride, blocks, tables + t * each);
        triples = tables;
#endif
    }
};

// The tokens [first, last) times the panels of several matrices with the same inputs. epilogue(range, panel, token,
// count, products) gets sum(code * x) of `count` tokens from `token` on, as products[t * PANEL_ROWS + row].
template <class Epilogue>
inline void ternary_matmul(const PanelRange* ranges, int count, const TokenCodes& in, int first, int last,
                           const Epilogue& epilogue) {
    const auto for_each_panel = [&](const auto& body) {
        for (int i = 0; i < count; i++)
            for (int panel = ranges[i].first; panel < ranges[i].last; panel++)
                body(i, panel, ranges[i].packed + size_t(panel) * in.blocks * BLOCK_BYTES);
    };
    thread_local std::vector<int32_t> products;
    const int tokens = last - first;
    products.resize(std::max(products.size(), size_t(tokens) * PANEL_ROWS));
#if defined(SIMD_LOOKUP)
    if (in.triples)
        return for_each_panel([&](int range, int panel, const uint8_t* w) {
            panel_dot(w, in.triples + size_t(first) * in.blocks * TRIPLES, tokens, in.blocks, products.data());
            epilogue(range, panel, first, tokens, products.data());
        });
    for (; first < last; first += LOOKUP_TOKENS)
        lookup_matmul(ranges, count, in.x + size_t(first) * in.stride, in.stride, in.blocks,
                      [&](int range, int panel, const int32_t* found) {
            epilogue(range, panel, first, std::min(LOOKUP_TOKENS, last - first), found);
        });
#else
    for_each_panel([&](int range, int panel, const uint8_t* w) {
        panel_dot(w, in.x + size_t(first) * in.stride, in.stride, tokens, in.blocks, products.data());
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < PANEL_ROWS; r++) products[t * PANEL_ROWS + r] -= in.sums[first + t];
        epilogue(range, panel, first, tokens, products.data());
    });
#endif
}
