// Products of float matrices, and of int8 matrices, on one thread.
//
// C (m x n) = A (m x k) @ B (k x n). B is packed into panels of PANEL columns: panel j holds, for each of the k rows,
// its columns j * PANEL .. j * PANEL + PANEL - 1, with zeros beyond n. A is read in place, by any two strides, so a
// transposed A needs no copy. The inner loop keeps ROWS x PANEL sums in registers.
//
// The order of every sum is fixed: it depends on k alone. So a result is the same for any number of threads.
#pragma once

#include <utility>

#include "float_simd.h"

#if defined(__AVX512F__)
constexpr int PANEL_VECS = 2, ROWS = 12;
#elif defined(__aarch64__)
constexpr int PANEL_VECS = 4, ROWS = 6;
#else
constexpr int PANEL_VECS = 2, ROWS = 6;
#endif
constexpr int PANEL = PANEL_VECS * LANES;
constexpr int DEPTH = 192;  // rows of a panel that are multiplied at once: with ROWS rows of A they fit in the L1 cache

inline int panels_of(int columns) { return (columns + PANEL - 1) / PANEL; }
inline int64_t panel_floats(int k, int columns) { return int64_t(panels_of(columns)) * PANEL * k; }

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

// C = A @ B, or C += A @ B. m is a tile of a few dozen rows, so that A stays in the cache.
inline void multiply(int m, int n, int k, Strided a, const float* panels, float* c, int64_t ldc,
                     bool accumulate = false) {
    for (int first = 0; first < k; first += DEPTH) {
        const int depth = std::min(DEPTH, k - first);
        for (int j = 0; j < n; j += PANEL)
            multiply_panel(m, n - j, depth, {a.data + first * a.column, a.row, a.column},
                           panels + int64_t(j) * k + first * PANEL, c + j, ldc, accumulate || first > 0);
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

// C (n x k) = A^T @ B for A (m x n) and B (m x k), both row-major: the gradient of a weight matrix. `row_of_b(p)`
// returns row p of B, k floats. Scratch: DEPTH * (k rounded up to panels + ROWS) floats.
template <class RowOfB>
inline void multiply_transposed(int m, int n, int k, const float* a, int64_t lda, RowOfB row_of_b, float* c,
                                int64_t ldc, float* scratch, bool accumulate = false) {
    float* const packed_a = scratch + panel_floats(DEPTH, k);
    for (int first = 0; first < m; first += DEPTH) {
        const int depth = std::min(DEPTH, m - first);
        for (int p = 0; p < depth; p++) {
            const float* const row = row_of_b(first + p);
            for (int j = 0; j < k; j += PANEL)
                pack_row(std::min(PANEL, k - j), row + j, scratch + int64_t(j) * depth + p * PANEL);
        }
        for (int i = 0; i < n; i += ROWS) {
            const int rows = std::min(ROWS, n - i);
            pack_columns(depth, rows, a + first * lda + i, lda, packed_a);
            for (int j = 0; j < k; j += PANEL)
                multiply_panel(rows, k - j, depth, {packed_a, 1, ROWS}, scratch + int64_t(j) * depth, c + i * ldc + j,
                               ldc, accumulate || first > 0);
        }
    }
}

// Packs B, rows of n floats that are ldb apart.
inline void pack(int k, int n, const float* b, int64_t ldb, float* panels) {
    for (int j = 0; j < n; j += PANEL)
        for (int p = 0; p < k; p++)
            pack_row(std::min(PANEL, n - j), b + p * ldb + j, panels + int64_t(j) * k + p * PANEL);
}

// The transpose of LANES x LANES floats, by exchanging ever smaller blocks.
template <int HALF, int... L>
inline void exchange(FloatVec& x, FloatVec& y, std::integer_sequence<int, L...>) {
    const FloatVec low = __builtin_shufflevector(x, y, (L & HALF ? LANES + L - HALF : L)...);
    const FloatVec high = __builtin_shufflevector(x, y, (L & HALF ? LANES + L : L + HALF)...);
    x = low, y = high;
}
template <int HALF>
inline void transpose_vecs(FloatVec (&rows)[LANES]) {
    if constexpr (HALF > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & HALF)) exchange<HALF>(rows[i], rows[i + HALF], std::make_integer_sequence<int, LANES>{});
        transpose_vecs<HALF / 2>(rows);
    }
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
