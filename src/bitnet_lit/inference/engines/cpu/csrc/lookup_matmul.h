// Products of weights packed as in packed_5bit.h with many tokens (a prompt, a large batch), by lookup: for AVX2.
//
// Four codes are one of 81 combinations. For each block of inputs and 32 tokens, the sums of four activations under all
// 81 combinations are put into a table. A row then adds the entries that its codes name: one addition does four
// products for sixteen tokens, where AVX2's byte products would take two multiplications and two additions. (This is
// the method of four Russians: Arlazarov, Dinic, Kronrod, Faradzhev 1970.) The sums are exact. They stay in int16 for
// as long as the activations' magnitudes cannot add up to more, and are then added to int32.
//
// Weights are packed in triples, so four triples make three combinations of four: each of the first three triples takes
// one code of the fourth.
#pragma once

#include "packing.h"

constexpr int LOOKUP_TOKENS = 32;  // an entry, an int16 for each token, is one cache line
constexpr int TABLE_ENTRIES = 81, TABLES_PER_BLOCK = BLOCK_INPUTS / 4;  // 31 KB of tables for a block

struct alignas(64) TokenVec {  // an int16 for each token
    simd::Int16Vec half[2];
};

inline TokenVec operator+(const TokenVec& a, const TokenVec& b) {
    return {simd::add_int16(a.half[0], b.half[0]), simd::add_int16(a.half[1], b.half[1])};
}
inline TokenVec operator-(const TokenVec& a, const TokenVec& b) {
    return {simd::sub_int16(a.half[0], b.half[0]), simd::sub_int16(a.half[1], b.half[1])};
}

struct LookupTable {  // entry c0 + 3 c1 + 9 c2 + 27 c3, from -40 to 40, of four codes
    TokenVec entry[TABLE_ENTRIES];
};

// The table of four inputs, whose activations are a, b, c and d.
inline void build_table(const TokenVec& a, const TokenVec& b, const TokenVec& c, const TokenVec& d,
                        LookupTable& table) {
    TokenVec* to = table.entry;
    TokenVec with_d = TokenVec{} - a - b - c - d;
    for (int i = 0; i < 3; i++, with_d = with_d + d) {
        TokenVec with_c = with_d;
        for (int j = 0; j < 3; j++, with_c = with_c + c) {
            TokenVec with_b = with_c;
            for (int k = 0; k < 3; k++, with_b = with_b + b) {
                *to++ = with_b;
                *to++ = with_b + a;
                *to++ = with_b + a + a;
            }
        }
    }
}

// For each row of a panel, the entries that its codes name in the six tables of a block: int16 byte offsets from the
// middle entry of each table, four in `four` and two in `two`.
struct TableOffsets {
    uint64_t four[PANEL_ROWS];
    uint32_t two[PANEL_ROWS];
};

inline void decode_offsets(const uint8_t* block, TableOffsets& offsets) {
    using namespace simd;
    static_assert(sizeof(TokenVec) == 64);
    static constexpr TernaryDigits<int8_t> digits{27};
    const ByteVec one = set1_int8(1);
    ByteVec signs = load(block + 128);
    Int16Vec even[TABLES_PER_BLOCK], odd[TABLES_PER_BLOCK];
    for (int u = 0; u < 2; u++, block += 64) {
        const ByteVec w[2] = {load(block), load(block + 32)};
        const ByteVec magnitudes[4] = {low_nibbles(w[0]), high_nibbles(w[0]), low_nibbles(w[1]), high_nibbles(w[1])};
        ByteVec sign[4];
        for (ByteVec& s : sign) s = or_bytes(signs, one), signs = add_int8(signs, signs);
        for (int k = 0; k < 3; k++) {
            const ByteVec digit = sign_int8(shuffle_bytes(broadcast_16(digits.of[k]), magnitudes[3]), sign[3]);
            const ByteVec entry = add_int8(digit, sign_int8(magnitudes[k], sign[k]));
            even[3 * u + k] = even_times_64(entry), odd[3 * u + k] = odd_times_64(entry);
        }
    }
    store_interleaved_4(offsets.four, even), store_interleaved_4(offsets.four + PANEL_ROWS / 2, odd);
    store_interleaved_2(offsets.two, even + 4), store_interleaved_2(offsets.two + PANEL_ROWS / 2, odd + 4);
}

// Adds the six entries of a block to each row's sums. Loads are the bottleneck, so a row's offsets are read as two
// words.
NOINLINE inline void add_table_entries(const TableOffsets& offsets, const LookupTable* tables, TokenVec* sums) {
    const char* middle = (const char*)tables->entry + TABLE_ENTRIES / 2 * sizeof(TokenVec);
    const auto add = [&](TokenVec& sum, int table, int16_t offset) {
        sum = sum + *(const TokenVec*)(middle + table * sizeof(LookupTable) + offset);
    };
    for (int row = 0; row < PANEL_ROWS; row++) {
        TokenVec sum = sums[row];
        const uint64_t four = offsets.four[row];
        const uint32_t two = offsets.two[row];
#pragma GCC unroll 4
        for (int table = 0; table < 4; table++) add(sum, table, int16_t(four >> 16 * table));
        add(sum, 4, int16_t(two)), add(sum, 5, int16_t(two >> 16));
        sums[row] = sum;
    }
}

// One panel's sums as int32, [token * PANEL_ROWS + row]; added to what is there, or written over it.
inline void flush_to_int32(const TokenVec* sums, bool accumulate, int32_t* to) {
    for (int row = 0; row < PANEL_ROWS; row += 8)
        for (int token = 0; token < LOOKUP_TOKENS; token += 8) {
            simd::Int32Vec columns[8];
            simd::transpose_8((const int16_t*)(sums + row) + token, LOOKUP_TOKENS, columns);
            int32_t* out = to + token * PANEL_ROWS + row;
            for (int t = 0; t < 8; t++, out += PANEL_ROWS)
                simd::store(out, accumulate ? simd::add(columns[t], simd::load(out)) : columns[t]);
        }
}

// LOOKUP_TOKENS tokens times the panels of all ranges. epilogue(range, panel, products) gets sum(code * x) as
// products[token * PANEL_ROWS + row].
template <class Epilogue>
inline void lookup_matmul(const PanelRange* ranges, int count, const int8_t* x, size_t stride, int blocks,
                          const Epilogue& epilogue) {
    using namespace simd;
    thread_local Buffer<TokenVec> sums;
    thread_local Buffer<int32_t> flushed;  // what no longer fits into int16
    thread_local Buffer<LookupTable> tables{TABLES_PER_BLOCK};
    size_t rows = 0;
    for (int i = 0; i < count; i++) rows += size_t(ranges[i].last - ranges[i].first) * PANEL_ROWS;
    if (!rows) return;  // a thread that got no rows
    if (sums.bytes < rows * sizeof(TokenVec)) sums.reset(rows), flushed.reset(rows * LOOKUP_TOKENS);
    std::memset((void*)sums.data, 0, rows * sizeof(TokenVec));
    bool has_flushed = false;
    TokenVec bound{};  // the sum of magnitudes so far: no sum can be larger
    for (int block = 0; block < blocks; block++) {
        TokenVec in[BLOCK_INPUTS], magnitude{};
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < BLOCK_INPUTS; i += 8) {
                Int16Vec columns[8];
                transpose_8(x + size_t(half) * 16 * stride + block * BLOCK_INPUTS + i, stride, columns);
                for (int j = 0; j < 8; j++) {
                    in[i + j].half[half] = columns[j];
                    magnitude.half[half] = add_int16(magnitude.half[half], abs_int16(columns[j]));
                }
            }
        bound = bound + magnitude;  // below 2 * 32767: an overflow shows as a negative number
        if (any_negative(bound.half[0]) || any_negative(bound.half[1])) {
            for (size_t row = 0; row < rows; row += PANEL_ROWS)
                flush_to_int32(sums + row, has_flushed, flushed + row * LOOKUP_TOKENS);
            std::memset((void*)sums.data, 0, rows * sizeof(TokenVec));
            has_flushed = true, bound = magnitude;
        }
        // Triples u, u + 1 and u + 2 each take one input of triple u + 3.
        for (int u = 0; u < TRIPLES; u += 4)
            for (int k = 0; k < 3; k++) {
                const TokenVec* triple = in + u + k;
                build_table(triple[0], triple[TRIPLES], triple[2 * TRIPLES], in[u + 3 + k * TRIPLES],
                            tables[u / 4 * 3 + k]);
            }
        TokenVec* panel_sums = sums;
        for (int i = 0; i < count; i++)
            for (int panel = ranges[i].first; panel < ranges[i].last; panel++, panel_sums += PANEL_ROWS) {
                const uint8_t* w = ranges[i].packed + (size_t(panel) * blocks + block) * BLOCK_BYTES;
                for (int line = 0; line < BLOCK_BYTES; line += 64)
                    __builtin_prefetch(w + size_t(blocks) * BLOCK_BYTES + line);  // the same block of the next panel
                alignas(64) TableOffsets offsets;
                decode_offsets(w, offsets);
                add_table_entries(offsets, tables, panel_sums);
            }
    }
    const TokenVec* panel_sums = sums;
    for (int i = 0; i < count; i++)
        for (int panel = ranges[i].first; panel < ranges[i].last; panel++, panel_sums += PANEL_ROWS) {
            int32_t products[LOOKUP_TOKENS * PANEL_ROWS];
            int32_t* to = has_flushed ? flushed + (panel_sums - sums) * LOOKUP_TOKENS : products;
            flush_to_int32(panel_sums, has_flushed, to);
            epilogue(i, panel, to);
        }
}
