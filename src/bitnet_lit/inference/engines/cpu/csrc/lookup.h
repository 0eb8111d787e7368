// Products of weights as in triples.h and many tokens by lookup.
//
// Four codes are one of 81 sets. The sum of four activations under each set is made once for 32 tokens, and a row adds
// the one that its codes name: an addition for four products of sixteen tokens, where AVX2's multiplication of bytes
// and an addition make two. (The method of four Russians: Arlazarov, Dinic, Kronrod, Faradzhev 1970.) The sums are
// exact: they stay in 16 bits for as long as the activations' magnitudes cannot add up to more.
//
// Four triples make three sets: each of the first three with a digit of the fourth.
#pragma once

#include "packing.h"

constexpr int LOOKUP_TOKENS = 32;                    // a sum for all of them is a cache line
constexpr int SETS = 81, SETS_OF_BLOCK = BLOCK / 4;  // 31 KB of sums for a block

struct alignas(64) Tokens {
    simd::Words half[2];
};  // a number for each token

inline Tokens operator+(const Tokens& a, const Tokens& b) {
    return {simd::add_words(a.half[0], b.half[0]), simd::add_words(a.half[1], b.half[1])};
}
inline Tokens operator-(const Tokens& a, const Tokens& b) {
    return {simd::sub_words(a.half[0], b.half[0]), simd::sub_words(a.half[1], b.half[1])};
}

struct Table {
    Tokens sum[SETS];
};  // set c0 + 3 c1 + 9 c2 + 27 c3 of four codes, from -40 to 40

inline void fill_table(const Tokens& a, const Tokens& b, const Tokens& c, const Tokens& d, Table& table) {
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

// Of each row of a group its six sets in a block: offsets into the tables, from their middle, of 16 bits.
struct Places {
    uint64_t four[ROWS];
    uint32_t two[ROWS];
};

inline void find_places(const uint8_t* block, Places& places) {
    using namespace simd;
    static_assert(sizeof(Tokens) == 64);
    static constexpr Digits<int8_t> digits{27};
    const Bytes one = all_bytes(1);
    Bytes signs = load(block + 128);
    Words even[SETS_OF_BLOCK], odd[SETS_OF_BLOCK];
    for (int u = 0; u < 2; u++, block += 64) {
        const Bytes w[2] = {load(block), load(block + 32)};
        const Bytes magnitudes[4] = {low_nibbles(w[0]), high_nibbles(w[0]), low_nibbles(w[1]), high_nibbles(w[1])};
        Bytes sign[4];
        for (Bytes& s : sign) s = any_of(signs, one), signs = add_bytes(signs, signs);
        for (int k = 0; k < 3; k++) {
            const Bytes digit = signed_by(choose(sixteen(digits.of[k]), magnitudes[3]), sign[3]);
            const Bytes set = add_bytes(digit, signed_by(magnitudes[k], sign[k]));
            even[3 * u + k] = even_times_64(set), odd[3 * u + k] = odd_times_64(set);
        }
    }
    store_fours(places.four, even), store_fours(places.four + ROWS / 2, odd);
    store_twos(places.two, even + 4), store_twos(places.two + ROWS / 2, odd + 4);
}

ONCE inline void add_sums(const Places& places, const Table* tables, Tokens* sums) {
    const char* middle = (const char*)tables->sum + SETS / 2 * sizeof(Tokens);
    const auto add = [&](Tokens& sum, int set, int16_t place) {
        sum = sum + *(const Tokens*)(middle + set * sizeof(Table) + place);
    };
    for (int row = 0; row < ROWS; row++) {
        Tokens sum = sums[row];
        const uint64_t four = places.four[row];  // loads are what this loop is made of
        const uint32_t two = places.two[row];
#pragma GCC unroll 4
        for (int set = 0; set < 4; set++) add(sum, set, int16_t(four >> 16 * set));
        add(sum, 4, int16_t(two)), add(sum, 5, int16_t(two >> 16));
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

// LOOKUP_TOKENS tokens times the groups of all parts; use(part, group, products) gets sum(code * x), [token * ROWS +
// row].
template <class Use>
inline void lookup_products(const Part* parts, int count, const int8_t* x, size_t stride, int blocks, const Use& use) {
    using namespace simd;
    thread_local Buffer<Tokens> sums;
    thread_local Buffer<int32_t> whole;  // what no longer fits into 16 bits
    thread_local Buffer<Table> tables{SETS_OF_BLOCK};
    size_t rows = 0;
    for (int i = 0; i < count; i++) rows += size_t(parts[i].last - parts[i].first) * ROWS;
    if (!rows) return;  // a thread without a share
    if (sums.bytes < rows * sizeof(Tokens)) sums.reset(rows), whole.reset(rows * LOOKUP_TOKENS);
    std::memset((void*)sums.data, 0, rows * sizeof(Tokens));
    bool widened = false;
    Tokens reach{};  // what magnitudes may have added up to
    for (int block = 0; block < blocks; block++) {
        Tokens in[BLOCK], magnitude{};
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < BLOCK; i += 8) {
                Words columns[8];
                columns_of(x + size_t(half) * 16 * stride + block * BLOCK + i, stride, columns);
                for (int j = 0; j < 8; j++) {
                    in[i + j].half[half] = columns[j];
                    magnitude.half[half] = add_words(magnitude.half[half], abs_words(columns[j]));
                }
            }
        reach = reach + magnitude;  // at most twice 32767, seen as negative
        if (any_negative(reach.half[0]) || any_negative(reach.half[1])) {
            for (size_t row = 0; row < rows; row += ROWS) widen_sums(sums + row, widened, whole + row * LOOKUP_TOKENS);
            std::memset((void*)sums.data, 0, rows * sizeof(Tokens));
            widened = true, reach = magnitude;
        }
        // Of triples 4 u to 4 u + 3, the first three each with an input of the last.
        for (int u = 0; u < TRIPLES; u += 4)
            for (int k = 0; k < 3; k++) {
                const Tokens* triple = in + u + k;
                fill_table(triple[0], triple[TRIPLES], triple[2 * TRIPLES], in[u + 3 + k * TRIPLES],
                           tables[u / 4 * 3 + k]);
            }
        Tokens* place = sums;
        for (int i = 0; i < count; i++)
            for (int group = parts[i].first; group < parts[i].last; group++, place += ROWS) {
                const uint8_t* w = parts[i].packed + (size_t(group) * blocks + block) * BLOCK_BYTES;
                for (int line = 0; line < BLOCK_BYTES; line += 64)
                    __builtin_prefetch(w + size_t(blocks) * BLOCK_BYTES + line);
                alignas(64) Places places;
                find_places(w, places);
                add_sums(places, tables, place);
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
