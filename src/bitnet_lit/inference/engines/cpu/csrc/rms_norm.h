// RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * weight, as in model/layers.py.
#pragma once

#include <cmath>

#include "float_simd.h"

// The norm of n numbers; `out` may be `in`.
inline void rms_norm(const float* in, const float* weight, int n, float eps, float* out) {
    const float factor = 1.0f / std::sqrt(sum_of_squares(in, n) / float(n) + eps);
    for (int i = 0; i < n; i++) out[i] = in[i] * factor * weight[i];
}
