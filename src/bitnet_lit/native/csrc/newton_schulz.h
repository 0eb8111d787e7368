// Newton-Schulz iterations of Muon: training/muon.py's `orthogonalize`, for many matrices at once. They are in float32,
// or in bfloat16 where the processor multiplies bfloat16 numbers (rounded.h).
//
//     x = x / |x|;  repeat: g = x @ x.T;  x = a x + (b g + c g @ g) @ x
//
// One thread takes one matrix, so the matrices stay in its cache and no thread waits for another. g and g @ g are
// symmetric: only blocks on and below the diagonal are computed.
#pragma once

#include "matmul.h"
#include "parallel.h"
#include "rounded.h"
#include "rows.h"

struct Iterations {
    float a, b, c, eps;
    int32_t steps;
};

struct NewtonSchulz {
    const float* inputs;  // (count, rows, columns)
    float* outputs;
    int32_t count, rows, columns, threads;
    Iterations iterations;
    Fork fork;
};

struct MuonStep {
    float* const* weights;  // count matrices (rows, columns), as the next two
    const float* const* gradients;
    float* const* averages;
    float* const* row_moments;  // (rows) of each matrix: NorMuon's running means of squares; null for plain Muon
    int32_t count, rows, columns, threads, nesterov, cautious;
    // new_share is 1 - momentum. A weight becomes kept * weight - rate * update. Where cautious, only a weight that has
    // the sign of its update is multiplied by kept.
    float momentum, new_share, kept, rate, row_new_share;
    Iterations iterations;
    Fork fork;
};

// Blocks above the diagonal of g (m, m), which is symmetric, from those below it.
inline void mirror(int m, float* g) {
    for (int i = 0; i < m; i += PANEL)
        for (int j = 0; j < i; j += PANEL)
            transpose(std::min(PANEL, m - i), std::min(PANEL, m - j), g + int64_t(i) * m + j, m, g + int64_t(j) * m + i,
                      m);
}

// g (m, m) = A @ panels, which is symmetric.
inline void multiply_symmetric(int m, int k, const float* a, const float* panels, float* g) {
    constexpr int STEP = LANES == 16 ? 32 : 4 * ROWS;
    for (int i = 0; i < m; i += STEP) {  // columns beyond the rows are known by symmetry
        const int rows = std::min(STEP, m - i);
        multiply(rows, std::min(m, (i + rows + PANEL - 1) / PANEL * PANEL), k, {a + int64_t(i) * k, k, 1}, panels,
                 g + int64_t(i) * m, m, false);
    }
    mirror(m, g);
}

// g (m, m) = a I + b G + c G @ G, for G in g.
inline void add_polynomial(const Iterations& job, int m, const float* square, float* g) {
#pragma omp simd
    for (int64_t i = 0; i < int64_t(m) * m; i++) g[i] = job.b * g[i] + job.c * square[i];
    for (int i = 0; i < m; i++) g[int64_t(i) * m + i] += job.a;
}

// The iterations on x (m, n), m <= n. Returns where the result is: x or `next`.
inline float* iterate(const Iterations& job, int m, int n, float* x, float* next) {
    float *const g = scratch(2, int64_t(m) * m), *const square = scratch(3, int64_t(m) * m);
    float* const panels = scratch(4, std::max(panel_floats(n, m), panel_floats(m, n)));
    for (int step = 0; step < job.steps; step++) {
        pack_transposed(n, m, x, n, panels);
        multiply_symmetric(m, n, x, panels, g);
        pack(m, m, g, m, panels);
        multiply_symmetric(m, m, g, panels, square);
        add_polynomial(job, m, square, g);
        pack(m, n, x, n, panels);
        for (int i = 0; i < m; i += 64)
            multiply(std::min(64, m - i), n, m, {g + int64_t(i) * m, m, 1}, panels, next + int64_t(i) * n, n, false);
        std::swap(x, next);
    }
    return x;
}

// The same for multiples of 32. Factors are rounded to bfloat16, as in torch.optim.Muon and on a
// GPU, because the iterations need no more. Each matrix is rounded once: its tiles become its panels too.
inline void iterate_rounded(const Iterations& job, int m, int n, float* x) {
    float *const g = scratch(2, int64_t(m) * m), *const square = scratch(3, int64_t(m) * m);
    uint16_t* const panels = scratch<uint16_t>(4, int64_t(m) * n);
    uint16_t *const tiles = scratch<uint16_t>(6, int64_t(m) * n), *const g_tiles = scratch<uint16_t>(7, int64_t(m) * m);
    const auto symmetric = [&](int k, const uint16_t* a, float* to) {
        for (int i = 0; i < m; i += 32)
            for (int j = 0; j <= i; j += 32)
                multiply_rounded(k, a + int64_t(i) * k, panels + int64_t(j) * k, to + int64_t(i) * m + j, m);
        mirror(m, to);
    };
    round_rows(m, n, x, tiles);
    for (int step = 0; step < job.steps; step++) {
        transposed_panels_of_tiles(m, n, tiles, panels);
        symmetric(n, tiles, g);
        round_rows(m, m, g, g_tiles);
        panels_of_tiles(m, m, g_tiles, panels);
        symmetric(m, g_tiles, square);
        add_polynomial(job, m, square, g);
        panels_of_tiles(m, n, tiles, panels);
        for (int i = 0; i < m; i += 32) {
            float* const rows = x + int64_t(i) * n;
            round_rows(32, m, g + int64_t(i) * m, g_tiles);
            for (int j = 0; j < n; j += 32) multiply_rounded(m, g_tiles, panels + int64_t(j) * m, rows + j, n);
            if (step + 1 < job.steps) round_rows(32, n, rows, tiles + int64_t(i) * n);
        }
    }
}

// `output` may be the input.
inline void orthogonalize(const Iterations& job, int rows, int columns, const float* input, float* output) {
    const bool is_tall = rows > columns;
    const int m = std::min(rows, columns), n = std::max(rows, columns);
    const int64_t size = int64_t(m) * n;
    float* x = scratch(0, size);
    double sum = 0;
    for (int64_t i = 0; i < size; i += 4096) sum += sum_of_squares(input + i, int(std::min<int64_t>(4096, size - i)));
    const float inverse = 1.0f / std::max(float(std::sqrt(sum)), job.eps);
    if (is_tall) transpose(n, m, input, m, x, n);
    else std::copy(input, input + size, x);
#pragma omp simd
    for (int64_t i = 0; i < size; i++) x[i] *= inverse;
    if (HAS_BFLOAT16 && m % 32 == 0 && n % 32 == 0 && m >= AMX_SIZE) iterate_rounded(job, m, n, x);
    else x = iterate(job, m, n, x, scratch(1, size));
    if (is_tall) transpose(m, n, x, n, output, m);
    else std::copy(x, x + size, output);
}

inline void newton_schulz(const NewtonSchulz& job) {
    const int64_t size = int64_t(job.rows) * job.columns;
    parallel_for({job.fork, job.threads}, job.count, [&](int64_t i) {
        orthogonalize(job.iterations, job.rows, job.columns, job.inputs + i * size, job.outputs + i * size);
    });
}

// NorMuon (training/normuon.py): divides each row by the root of its running mean of squares, and keeps the norm.
inline void normalize_rows(int rows, int columns, float new_share, float* moments, float* update) {
    constexpr double LEAST = 1e-10;
    double before = 0, after = 0;
    float* const scales = scratch(0, rows);
    for (int row = 0; row < rows; row++) {
        const double squares = sum_of_squares(update + int64_t(row) * columns, columns);
        moments[row] = std::fma(new_share, float(squares / columns) - moments[row], moments[row]);
        scales[row] = float(1 / (std::sqrt(double(moments[row])) + LEAST));
        before += squares;
        after += squares * scales[row] * scales[row];
    }
    const float factor = float(std::sqrt(before) / (std::sqrt(after) + LEAST));
    for (int row = 0; row < rows; row++) {
        float *const values = update + int64_t(row) * columns, scale = scales[row] * factor;
#pragma omp simd
        for (int i = 0; i < columns; i++) values[i] *= scale;
    }
}

// A whole step: the momentum, the iterations, weight decay, and the move of the weights.
inline void muon_step(const MuonStep& job) {
    const int64_t size = int64_t(job.rows) * job.columns;
    parallel_for({job.fork, job.threads}, job.count, [&](int64_t matrix) {
        float *const weight = job.weights[matrix], *const average = job.averages[matrix];
        const float* const gradient = job.gradients[matrix];
        float* const update = scratch(5, size);
        const float old_share = job.nesterov ? job.momentum : 1.0f;
        // The roundings are those of PyTorch's lerp and add, so that ranks that share the work get the same bits.
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            const float mean = std::fma(job.new_share, gradient[i] - average[i], average[i]);
            average[i] = mean;
            update[i] = std::fma(old_share - 1.0f, mean - gradient[i], mean);
        }
        orthogonalize(job.iterations, job.rows, job.columns, update, update);
        if (job.row_moments) normalize_rows(job.rows, job.columns, job.row_new_share, job.row_moments[matrix], update);
        if (job.cautious) {
#pragma omp simd
            for (int64_t i = 0; i < size; i++) {
                const float kept = update[i] * weight[i] >= 0 ? job.kept : 1.0f;
                weight[i] = std::fma(-job.rate, update[i], weight[i] * kept);
            }
            return;
        }
#pragma omp simd
        for (int64_t i = 0; i < size; i++) weight[i] = std::fma(-job.rate, update[i], weight[i] * job.kept);
    });
}
