// Products of packed weights (packing.h) and many tokens by lookup, for processors without a product of bytes that adds into
// 32 bits.
//
// Four codes are one of 81 sets. The sum of four activations under each set is made once for 32 tokens, and a row adds the
// one that its byte of codes names: an addition for four products of sixteen tokens, where AVX2's multiplication of bytes
// and an addition make two. (The method of four Russians: Arlazarov, Dinic, Kronrod, Faradzhev 1970.) The sums are exact:
// they stay in 16 bits for as long as the activations' magnitudes cannot add up to more.
#pragma once

#include "kernels.h"

struct Part { const uint8_t* packed; int first, last; };  // groups [first, last) of a matrix

inline int rows_of(const Part* parts, int count) {
    int rows = 0;
    for (int i = 0; i < count; i++) rows += (parts[i].last - parts[i].first) * ROWS;
    return rows;
}

constexpr int LOOKUP_TOKENS = 32;  // a sum for all of them is a cache line

#if defined(SIMD_LOOKUP)
constexpr bool LOOKS_UP = true;
constexpr int SETS = 81;
constexpr int TOGETHER = 2;        // blocks whose tables are in use: 41 KB
constexpr int GROUPS_AT_ONCE = 2;  // whose sums' places are found before they are added: what is stored must have arrived
constexpr int LOOKUP_ROWS = 512;   // from how many on the tables pay off, which cost as much as 80

struct alignas(64) Tokens { simd::Words half[2]; };  // a number for each token

inline Tokens operator+(const Tokens& a, const Tokens& b) {
    return {simd::add_words(a.half[0], b.half[0]), simd::add_words(a.half[1], b.half[1])};
}
inline Tokens operator-(const Tokens& a, const Tokens& b) {
    return {simd::sub_words(a.half[0], b.half[0]), simd::sub_words(a.half[1], b.half[1])};
}

struct Table { Tokens sum[SETS]; };  // set c0 + 3 c1 + 9 c2 + 27 c3 of codes + 1 of the inputs j, j + 4, j + 8, j + 12

inline void fill_table(const Tokens* inputs, Table& table) {
    const Tokens a = inputs[0], b = inputs[4], c = inputs[8], d = inputs[12];
    Tokens* to = table.sum;
    Tokens with_d = Tokens{} - a - b - c - d;
    for (int i = 0; i < 3; i++, with_d = with_d + d) {
        Tokens with_c = with_d;
        for (int j = 0; j < 3; j++, with_c = with_c + c) {
            Tokens with_b = with_c;
            for (int k = 0; k < 3; k++, with_b = with_b + b) {
                *to++ = with_b;
                *to++ = with_b + a;
                *to++ = with_b + a + a;
            }
        }
    }
}

// One group's rows; places are offsets into the four tables of each block, 16 bits each, a word for a row.
inline void add_sums(const uint64_t (*places)[ROWS], const Table* tables, Tokens* sums) {
    for (int row = 0; row < ROWS; row++) {
        Tokens sum = sums[row];
#pragma GCC unroll 2
        for (int block = 0; block < TOGETHER; block++) {
            uint64_t place = places[block][row];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++, place >>= 16)
                sum = sum + *(const Tokens*)((const char*)&tables[4 * block + j] + uint16_t(place));
        }
        sums[row] = sum;
    }
}

// One group's sums to 32 bits, [token * ROWS + row]; adds to what is there, or sets it.
inline void widen_sums(const Tokens* sums, bool adds, int32_t* to) {
    for (int row = 0; row < ROWS; row += 8)
        for (int token = 0; token < LOOKUP_TOKENS; token += 8) {
            simd::Sums columns[8];
            simd::columns_of((const int16_t*)(sums + row) + token, LOOKUP_TOKENS, columns);
            int32_t* place = to + token * ROWS + row;
            for (int t = 0; t < 8; t++, place += ROWS)
                simd::store(place, adds ? simd::add(columns[t], simd::load(place)) : columns[t]);
        }
}

// LOOKUP_TOKENS tokens times the groups of all parts; use(part, group, products) gets sum(code * x), [token * ROWS + row].
template <class Use>
inline void lookup_products(const Part* parts, int count, const int8_t* x, size_t stride, int blocks, const Use& use) {
    using namespace simd;
    const size_t rows = rows_of(parts, count);
    thread_local Buffer<Tokens> sums;
    thread_local Buffer<int32_t> whole;  // what no longer fits into 16 bits
    thread_local Buffer<Table> tables{4 * TOGETHER};
    if (sums.bytes < rows * sizeof(Tokens)) sums.reset(rows), whole.reset(rows * LOOKUP_TOKENS);
    bool widened = false;
    std::memset((void*)sums.data, 0, rows * sizeof(Tokens));
    Tokens reach{};
    for (int block = 0; block < blocks; block += TOGETHER) {
        Tokens in[TOGETHER * BLOCK], magnitude{};
        for (int half = 0; half < 2; half++)
            for (int b = 0; b < TOGETHER; b++) {
                Words columns[BLOCK];
                columns_of(x + size_t(half) * 16 * stride + (block + b) * BLOCK, stride, columns);
                for (int i = 0; i < BLOCK; i++) {
                    in[b * BLOCK + i].half[half] = columns[i];
                    magnitude.half[half] = add_words(magnitude.half[half], abs_words(columns[i]));
                }
            }
        reach = reach + magnitude;  // at most twice 32767, seen as negative
        if (any_negative(reach.half[0]) || any_negative(reach.half[1])) {
            for (size_t row = 0; row < rows; row += ROWS) widen_sums(sums + row, widened, whole + row * LOOKUP_TOKENS);
            std::memset((void*)sums.data, 0, rows * sizeof(Tokens));
            widened = true, reach = magnitude;
        }
        for (int b = 0; b < TOGETHER; b++)
            for (int j = 0; j < 4; j++) fill_table(in + b * BLOCK + j, tables[4 * b + j]);
        Tokens* place = sums;
        for (int i = 0; i < count; i++)
            for (int group = parts[i].first; group < parts[i].last; group += GROUPS_AT_ONCE) {
                const int now = std::min(GROUPS_AT_ONCE, parts[i].last - group);
                const uint8_t* w = parts[i].packed + (size_t(group) * blocks + block) * 64;
                alignas(64) uint64_t places[GROUPS_AT_ONCE][TOGETHER][ROWS];
                for (int g = 0; g < now; g++, w += size_t(blocks) * 64)
                    for (int b = 0; b < TOGETHER; b++) {
                        __builtin_prefetch(w + size_t(GROUPS_AT_ONCE * blocks + b) * 64);
                        set_places(w + b * 64, places[g][b]);
                    }
                for (int g = 0; g < now; g++, place += ROWS) add_sums(places[g], tables, place);
            }
    }
    const Tokens* place = sums;
    for (int i = 0; i < count; i++)
        for (int group = parts[i].first; group < parts[i].last; group++, place += ROWS) {
            int32_t products[LOOKUP_TOKENS * ROWS], *to = widened ? whole + (place - sums) * LOOKUP_TOKENS : products;
            widen_sums(place, widened, to);
            use(i, group, to);
        }
}
#else
constexpr bool LOOKS_UP = false;
#endif

// All tokens times the groups of parts of the same inputs. use(part, group, first, tokens, products, sums) gets the products
// of the tokens from `first` on, [token * ROWS + row]; sum(code * x) is a product less the token's number in `sums`.
template <class Use>
inline void multiply_parts(const Part* parts, int count, const int8_t* x, size_t stride, int tokens, int blocks,
                           const int32_t* sums, const Use& use) {
    int first = 0;
#if defined(SIMD_LOOKUP)
    static constexpr int32_t NOTHING[LOOKUP_TOKENS] = {};
    const bool pays = rows_of(parts, count) >= LOOKUP_ROWS;
    for (; pays && tokens - first >= LOOKUP_TOKENS; first += LOOKUP_TOKENS)
        lookup_products(parts, count, x + first * stride, stride, blocks, [&](int part, int group, const int32_t* products) {
            use(part, group, first, LOOKUP_TOKENS, products, NOTHING);
        });
#endif
    if (first == tokens) return;
    thread_local std::vector<int32_t> products;
    products.resize(size_t(tokens - first) * ROWS);
    for (int i = 0; i < count; i++)
        for (int group = parts[i].first; group < parts[i].last; group++) {
            group_dots(parts[i].packed + size_t(group) * blocks * 64, x + first * stride, stride, tokens - first, blocks,
                       products.data());
            use(i, group, first, tokens - first, products.data(), sums + first);
        }
}
