// Products of float matrices, and of int8 matrices, on one thread.
//
// C (m x n) = A (m x k) @ B (k x n). B is packed into panels of PANEL columns: panel j holds, for each of the k rows,
// its columns j * PANEL .. j * PANEL + PANEL - 1, with zeros beyond n. A is read in place, by any two strides, so a
// transposed A needs no copy. The inner loop keeps ROWS x PANEL sums in registers.
//
// The order of every sum is fixed: it depends on k alone. So a result is the same for any number of threads.
//
// With AMX (amx.h) panels whose depth is a multiple of 32 can be split after they are packed; `multiply` then gets
// `is_split`, and splits A.
#pragma once

#include <utility>

#include "amx.h"
#include "float_simd.h"
#include "parallel.h"

#if defined(__AVX512F__)
constexpr int PANEL_VECS = 2, ROWS = 12;
#elif defined(__aarch64__)
constexpr int PANEL_VECS = 4, ROWS = 6;
#else
constexpr int PANEL_VECS = 2, ROWS = 6;
#endif
constexpr int PANEL = PANEL_VECS * LANES;
constexpr int DEPTH = 192;  // rows of a panel that are multiplied at once: with ROWS rows of A they fit in the L1 cache
constexpr int SPLIT_DEPTH = 1024;  // the same for the matrix unit, where they fit in the L2 cache
constexpr int SPLIT_CHUNK = 256;   // the same of `Chunks`: small enough that several threads pack

inline int panels_of(int columns) { return (columns + PANEL - 1) / PANEL; }
inline int64_t panel_floats(int k, int columns) { return int64_t(panels_of(columns)) * PANEL * k; }

// The first `count` numbers at p, and zeros.
inline FloatVec load_first(const float* p, int count) {
    if (count >= LANES) return load_floats(p);
    FloatVec v{};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
}

struct Strided {  // element (i, p) is data[i * row + p * column]
    const float* data;
    int64_t row, column;
};

template <int R>
NOINLINE void multiply_rows(int k, const float* a, int64_t row, int64_t column, const float* panel, float* c,
                            int64_t ldc, int columns, bool accumulate) {
    FloatVec sums[R][PANEL_VECS];
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 16
        for (int v = 0; v < PANEL_VECS; v++) sums[i][v] = FloatVec{};
    for (int p = 0; p < k; p++) {
        FloatVec b[PANEL_VECS];
#pragma GCC unroll 16
        for (int v = 0; v < PANEL_VECS; v++) b[v] = load_floats(panel + p * PANEL + v * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) {
            const FloatVec x = broadcast(a[i * row + p * column]);
#pragma GCC unroll 16
            for (int v = 0; v < PANEL_VECS; v++) sums[i][v] = fmadd(x, b[v], sums[i][v]);
        }
    }
    if (columns >= PANEL) {
#pragma GCC unroll 16
        for (int i = 0; i < R; i++)
#pragma GCC unroll 16
            for (int v = 0; v < PANEL_VECS; v++) {
                float* to = c + i * ldc + v * LANES;
                store_floats(to, accumulate ? load_floats(to) + sums[i][v] : sums[i][v]);
            }
        return;
    }
    float line[PANEL];
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
#pragma GCC unroll 16
        for (int v = 0; v < PANEL_VECS; v++) store_floats(line + v * LANES, sums[i][v]);
        for (int j = 0; j < columns; j++) c[i * ldc + j] = accumulate ? c[i * ldc + j] + line[j] : line[j];
    }
}

// multiply_rows<1>, ..., multiply_rows<ROWS>
template <int... R>
inline auto multiply_rows_of(int rows, std::integer_sequence<int, R...>) {
    static constexpr decltype(&multiply_rows<1>) table[] = {multiply_rows<R + 1>...};
    return table[rows - 1];
}

// Rows m of C += or = A @ one panel, whose columns begin at C's first column.
inline void multiply_panel(int m, int columns, int k, Strided a, const float* panel, float* c, int64_t ldc,
                           bool accumulate) {
    for (int i = 0; i < m; i += ROWS) {
        const int rows = std::min(ROWS, m - i);
        const auto multiply = multiply_rows_of(rows, std::make_integer_sequence<int, ROWS>{});
        multiply(k, a.data + i * a.row, a.row, a.column, panel, c + i * ldc, ldc, columns, accumulate);
    }
}

// Tiles of A for multiply_split_panel: m x k, k a multiple of 32. Rows beyond m are zero. Column p is multiplied by
// factors[p] first, where there are `factors`.
inline void split_rows(int m, int k, Strided a, uint16_t* to, const float* factors = nullptr) {
    for (int i = 0; i < m; i += 16)
        for (int p = 0; p < k; p += 32, to += 1024) {
            const float* const at = a.data + i * a.row + p * a.column;
            const int rows = std::min(16, m - i);
            if (a.column != 1) {  // a.row is 1
                split_columns(at, a.column, rows, to, factors ? factors + p : nullptr);
                continue;
            }
            for (int r = 0; r < 16; r++) {
                const float* const row = at + r * a.row;
                FloatVec x{}, y{};
                if (r < rows) x = load_floats(row), y = load_floats(row + LANES);
                if (factors) x *= load_floats(factors + p), y *= load_floats(factors + p + LANES);
                store_split(x, y, to + r * 32);
            }
        }
}
inline void split_panel(int k, float* panel) {
    for (int p = 0; p < k; p += 32) split_block(panel + p * PANEL);
}

// The same on the matrix unit. 32 rows of A stay in the cache, and the panels pass by. A sum is taken out of the
// registers as rarely as possible, because storing and loading it takes as long as the products of 16 columns of A.
// `factors`: those of the columns of A; with them the panels are EXACT (amx.h).
inline void multiply_split(int m, int n, int k, Strided a, const float* panels, float* c, int64_t ldc, bool accumulate,
                           int panel_rows, const float* factors = nullptr) {
    const auto multiply = factors ? multiply_split_panel<true> : multiply_split_panel<false>;
    uint16_t* const tiles = scratch<uint16_t>(20, int64_t(32) * std::min(k, SPLIT_DEPTH) * 2);
    for (int i = 0; i < m; i += 32)
        for (int first = 0; first < k; first += SPLIT_DEPTH) {
            const int rows = std::min(32, m - i), depth = std::min(SPLIT_DEPTH, k - first);
            split_rows(rows, depth, {a.data + i * a.row + first * a.column, a.row, a.column}, tiles,
                       factors ? factors + first : nullptr);
            for (int j = 0; j < n; j += PANEL)
                multiply(rows, n - j, depth, tiles, panels + int64_t(j) * panel_rows + first * PANEL, c + i * ldc + j,
                         ldc, accumulate || first > 0);
        }
}

// C = A @ B, or C += A @ B. m is a tile of a few dozen rows, so that A stays in the cache. The panels may hold more
// than k rows: `panel_rows` of them.
inline void multiply(int m, int n, int k, Strided a, const float* panels, float* c, int64_t ldc, bool is_split,
                     bool accumulate = false, int panel_rows = 0) {
    const int rows = panel_rows ? panel_rows : k;
    if (is_split) return multiply_split(m, n, k, a, panels, c, ldc, accumulate, rows);
    for (int first = 0; first < k; first += DEPTH) {
        const int depth = std::min(DEPTH, k - first);
        const Strided part{a.data + first * a.column, a.row, a.column};
        for (int j = 0; j < n; j += PANEL)
            multiply_panel(m, n - j, depth, part, panels + int64_t(j) * rows + first * PANEL, c + j, ldc,
                           accumulate || first > 0);
    }
}

inline void pack_row(int columns, const float* b, float* to) {
    if (columns >= PANEL) {
#pragma GCC unroll 16
        for (int v = 0; v < PANEL_VECS; v++) store_floats(to + v * LANES, load_floats(b + v * LANES));
    } else {
        for (int j = 0; j < PANEL; j++) to[j] = j < columns ? b[j] : 0.0f;
    }
}

// The first `columns` of ROWS columns of a, side by side: k rows of ROWS floats, whose rest is not used.
inline void pack_columns(int k, int columns, const float* a, int64_t lda, float* to) {
    if (columns < ROWS) {
        for (int p = 0; p < k; p++) std::copy(a + p * lda, a + p * lda + columns, to + p * ROWS);
        return;
    }
    for (int p = 0; p < k; p++) std::memcpy(to + p * ROWS, a + p * lda, sizeof(float) * ROWS);
}

// B (m x k), packed by chunks of rows, for `multiply_transposed`. The last chunk is filled up to a multiple of 32
// rows with zeros. `row_of_b(p)` returns row p.
struct Chunks {
    int rows, columns;  // of B
    bool is_split;

    int64_t floats() const { return panel_floats((rows + 31) / 32 * 32, columns); }
    int whole() const { return is_split ? SPLIT_CHUNK : DEPTH; }  // rows of every chunk but the last
    int count() const { return (rows + whole() - 1) / whole(); }
    int begin(int chunk) const { return chunk * whole(); }
    int depth(int chunk) const { return std::min(whole(), (rows - begin(chunk) + 31) / 32 * 32); }
    const float* at(const float* packed, int chunk) const { return packed + panel_floats(begin(chunk), columns); }
    template <class RowOfB>
    void pack(int chunk, float* packed, RowOfB row_of_b) const {
        float* const panels = packed + panel_floats(begin(chunk), columns);
        const int deep = depth(chunk), last = std::min(deep, rows - begin(chunk));
        for (int p = 0; p < deep; p++) {
            const float* const row = p < last ? row_of_b(begin(chunk) + p) : nullptr;
            for (int j = 0; j < columns; j += PANEL)
                pack_row(row ? std::min(PANEL, columns - j) : 0, row + j, panels + int64_t(j) * deep + p * PANEL);
        }
        if (is_split)
            for (int j = 0; j < columns; j += PANEL) split_panel(deep, panels + int64_t(j) * deep);
    }
};

// C (n x k) = A^T @ B for A (m x n), row-major, and the chunks of B: the gradient of a weight matrix. `factors`: those
// of the rows of A, where the chunks are split and EXACT (amx.h). There are as many as the chunks have rows.
inline void multiply_transposed(int n, const float* a, int64_t lda, const Chunks& chunks, const float* packed, float* c,
                                int64_t ldc, bool accumulate = false, const float* factors = nullptr) {
    const auto multiply = factors ? multiply_split_panel<true> : multiply_split_panel<false>;
    const int step = chunks.is_split ? 32 : ROWS, k = chunks.columns;
    float* const packed_a = scratch(20, int64_t(chunks.whole()) * step);
    for (int chunk = 0; chunk < chunks.count(); chunk++) {
        const int depth = chunks.depth(chunk), first = chunks.begin(chunk), real = std::min(depth, chunks.rows - first);
        const float* const panels = chunks.at(packed, chunk);
        for (int i = 0; i < n; i += step) {
            const int rows = std::min(step, n - i);
            const float* from = a + first * lda + i;
            int64_t stride = lda;
            if (chunks.is_split && real < depth) {  // rows beyond the end are zero
                float* const copy = scratch(21, int64_t(depth) * 32);
                std::fill(copy, copy + int64_t(depth) * 32, 0.0f);
                for (int p = 0; p < real; p++) std::copy(from + p * lda, from + p * lda + rows, copy + p * 32);
                from = copy, stride = 32;
            }
            if (chunks.is_split)
                split_rows(rows, depth, {from, 1, stride}, reinterpret_cast<uint16_t*>(packed_a),
                           factors ? factors + first : nullptr);
            else pack_columns(real, rows, from, lda, packed_a);
            if (i + step < n)  // the next columns come while these are multiplied
                for (int p = 0; p < real; p++) prefetch_row(a + (first + p) * lda + i + step, step);
            for (int j = 0; j < k; j += PANEL) {
                const float* const panel = panels + int64_t(j) * depth;
                float* const to = c + i * ldc + j;
                if (chunks.is_split)
                    multiply(rows, k - j, depth, reinterpret_cast<uint16_t*>(packed_a), panel, to, ldc,
                             accumulate || chunk > 0);
                else multiply_panel(rows, k - j, real, {packed_a, 1, ROWS}, panel, to, ldc, accumulate || chunk > 0);
            }
        }
    }
}

// Packs B, rows of n floats that are ldb apart.
inline void pack(int k, int n, const float* b, int64_t ldb, float* panels) {
    for (int j = 0; j < n; j += PANEL)
        for (int p = 0; p < k; p++)
            pack_row(std::min(PANEL, n - j), b + p * ldb + j, panels + int64_t(j) * k + p * PANEL);
}

// Panel of B = M transposed: column j of the panel is row j of M, k floats at m + j * ldm.
inline void pack_panel_transposed(int k, int columns, const float* m, int64_t ldm, float* panel) {
    for (int v = 0; v < PANEL; v += LANES) {
        const int here = std::min(LANES, columns - v);
        int p = 0;
        if (here == LANES)
            for (; p + LANES <= k; p += LANES) {
                FloatVec rows[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) rows[i] = load_floats(m + (v + i) * ldm + p);
                transpose_vecs<LANES / 2>(rows);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) store_floats(panel + (p + i) * PANEL + v, rows[i]);
            }
        for (; p < k; p++)
            for (int i = 0; i < LANES; i++) panel[p * PANEL + v + i] = i < here ? m[(v + i) * ldm + p] : 0.0f;
    }
}
inline void pack_transposed(int k, int n, const float* m, int64_t ldm, float* panels) {
    for (int j = 0; j < n; j += PANEL) pack_panel_transposed(k, n - j, m + j * ldm, ldm, panels + int64_t(j) * k);
}

// to (columns x rows) = the transpose of from (rows x columns).
inline void transpose(int rows, int columns, const float* from, int64_t row, float* to, int64_t to_row) {
    for (int i = 0; i < rows; i += LANES)
        for (int j = 0; j < columns; j += LANES) {
            if (i + LANES > rows || j + LANES > columns) {
                for (int k = i; k < std::min(i + LANES, rows); k++)
                    for (int l = j; l < std::min(j + LANES, columns); l++) to[l * to_row + k] = from[k * row + l];
                continue;
            }
            FloatVec block[LANES];
#pragma GCC unroll 16
            for (int k = 0; k < LANES; k++) block[k] = load_floats(from + (i + k) * row + j);
            transpose_vecs<LANES / 2>(block);
#pragma GCC unroll 16
            for (int k = 0; k < LANES; k++) store_floats(to + (j + k) * to_row + i, block[k]);
        }
}
