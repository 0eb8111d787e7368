// Newton-Schulz iterations of Muon, in float32: training/optimizers.py's `orthogonalize`, for many matrices at once.
//
//     x = x / |x|;  repeat: g = x @ x.T;  x = a x + (b g + c g @ g) @ x
//
// One thread takes one matrix, so the matrices stay in its cache and no thread waits for another. g and g @ g are
// symmetric: only blocks on and below the diagonal are computed.
#pragma once

#include "matmul.h"
#include "parallel.h"
#include "rows.h"

struct NewtonSchulz {
    const float* inputs;  // (count, rows, columns)
    float* outputs;
    int32_t count, rows, columns, steps, threads;
    float a, b, c, eps;
    Fork fork;
};

// g (m, m) = A @ panels, which is symmetric.
inline void multiply_symmetric(int m, int k, Strided a, const float* panels, float* g) {
    for (int first = 0; first < k; first += DEPTH)
        for (int j = 0; j < m; j += PANEL) {
            const int begin = j / ROWS * ROWS;  // rows above the panel's first column are known by symmetry
            multiply_panel(m - begin, m - j, std::min(DEPTH, k - first),
                           {a.data + begin * a.row + first * a.column, a.row, a.column},
                           panels + int64_t(j) * k + first * PANEL, g + int64_t(begin) * m + j, m, first > 0);
        }
    for (int i = 0; i < m; i += PANEL)
        for (int j = 0; j < i; j += PANEL)
            transpose(std::min(PANEL, m - i), std::min(PANEL, m - j), g + int64_t(i) * m + j, m, g + int64_t(j) * m + i,
                      m);
}

inline void newton_schulz_of(const NewtonSchulz& job, int index) {
    const bool is_tall = job.rows > job.columns;
    const int m = std::min(job.rows, job.columns), n = std::max(job.rows, job.columns);
    const int64_t size = int64_t(m) * n;
    float *x = scratch(0, size), *next = scratch(1, size);
    float *const g = scratch(2, int64_t(m) * m), *const square = scratch(3, int64_t(m) * m);
    float* const panels = scratch(4, std::max(panel_floats(n, m), panel_floats(m, n)));
    const float* const input = job.inputs + index * size;
    double sum = 0;
    for (int64_t i = 0; i < size; i += 4096) sum += sum_of_squares(input + i, int(std::min<int64_t>(4096, size - i)));
    const float inverse = 1.0f / std::max(float(std::sqrt(sum)), job.eps);
    if (is_tall) transpose(n, m, input, m, x, n);
    else std::copy(input, input + size, x);
#pragma omp simd
    for (int64_t i = 0; i < size; i++) x[i] *= inverse;
    for (int step = 0; step < job.steps; step++) {
        pack_transposed(n, m, x, n, panels);
        multiply_symmetric(m, n, {x, n, 1}, panels, g);
        pack(m, m, g, m, panels);
        multiply_symmetric(m, m, {g, m, 1}, panels, square);
#pragma omp simd
        for (int64_t i = 0; i < int64_t(m) * m; i++) g[i] = job.b * g[i] + job.c * square[i];
        for (int i = 0; i < m; i++) g[int64_t(i) * m + i] += job.a;
        pack(m, n, x, n, panels);
        for (int i = 0; i < m; i += 4 * ROWS)
            multiply(std::min(4 * ROWS, m - i), n, m, {g + int64_t(i) * m, m, 1}, panels, next + int64_t(i) * n, n);
        std::swap(x, next);
    }
    if (is_tall) transpose(m, n, x, n, job.outputs + index * size, m);
    else std::copy(x, x + size, job.outputs + index * size);
}

inline void newton_schulz(const NewtonSchulz& job) {
    parallel_for({job.fork, job.threads}, job.count, [&](int64_t i) { newton_schulz_of(job, int(i)); });
}
