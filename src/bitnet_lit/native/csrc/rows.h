// Operations on a row: RMSNorm, quantization to int8, the gated activation, the rotary embedding, and their gradients.
//
// Sums run over LANES partial sums in a fixed order.
#pragma once

#include "float_simd.h"

// exp(x) with a relative error below 2e-7. ln 2 is subtracted in two parts, so that the fraction keeps its low bits.
inline float accurate_exp(float x) {
    x = std::min(88.0f, std::max(-87.0f, x));
    const float n = std::nearbyint(x * 1.44269504f);
    const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;  // the polynomial of Cephes' expf
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return std::bit_cast<float>((int32_t(n) + 127) << 23) * p;
}

using IntVec = int32_t __attribute__((vector_size(4 * LANES)));

// The same for LANES numbers.
inline FloatVec accurate_exp(FloatVec x) {
    x = x > broadcast(88.0f) ? broadcast(88.0f) : x;
    x = x < broadcast(-87.0f) ? broadcast(-87.0f) : x;
    const FloatVec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const FloatVec n = fmadd(x, broadcast(1.44269504f), magic) - magic;
    const FloatVec f = fmadd(n, broadcast(2.12194440e-4f), fmadd(n, broadcast(-0.693359375f), x));
    FloatVec p = broadcast(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fmadd(p, f, broadcast(c));
    p = fmadd(p * f, f, f) + 1.0f;
    return (FloatVec)((__builtin_convertvector(n, IntVec) + 127) << 23) * p;
}

NOINLINE inline float dot_product(const float* x, const float* y, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

// 1 / sqrt(mean(x^2) + eps)
inline float inverse_rms(const float* x, int n, float eps) {
    return 1.0f / std::sqrt(sum_of_squares(x, n) / float(n) + eps);
}

inline void normalize(const float* x, const float* gain, float rstd, int n, float* h) {
#pragma omp simd
    for (int i = 0; i < n; i++) h[i] = x[i] * rstd * gain[i];
}

// The gradient of RMSNorm: dx from dh, the gradient of its output. gain_gradient is added to. dh is overwritten by dx.
NOINLINE inline void normalize_backward(const float* x, const float* gain, float rstd, int n, float* dh,
                                        float* gain_gradient) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) {
        const float unit = x[i] * rstd;
        gain_gradient[i] += dh[i] * unit;
        dh[i] *= gain[i];
        sum += dh[i] * unit;
    }
    const float mean = sum / float(n);
#pragma omp simd
    for (int i = 0; i < n; i++) dh[i] = rstd * (dh[i] - x[i] * rstd * mean);
}

// Codes of one token, and its scale: quant/activations.py's AbsMax, with the same operations on floats.
inline float quantize_row(const float* h, int n, float limit, int8_t* codes) {
    const float largest = abs_max(h, n), amax = largest < 1e-5f ? 1e-5f : largest;  // a NaN stays a NaN
    const float inverse = 1.0f / amax * limit;  // PyTorch computes limit / amax in these two steps
#pragma omp simd
    for (int i = 0; i < n; i++)
        codes[i] = int8_t(int32_t(std::nearbyint(std::min(limit, std::max(-limit - 1, h[i] * inverse)))));
    return amax / limit;
}

// y = act(gate) * up. For the backward pass of silu, sigmoid(gate) is kept where `sigmoid` is not NULL.
inline void gate_forward(const float* gate, const float* up, int n, bool relu2, float* y, float* sigmoid) {
    if (relu2) {
#pragma omp simd
        for (int i = 0; i < n; i++) {
            const float positive = std::max(gate[i], 0.0f);
            y[i] = positive * positive * up[i];
        }
        return;
    }
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        const FloatVec g = load_floats(gate + i), s = 1.0f / (1.0f + accurate_exp(-g));
        store_floats(y + i, g * s * load_floats(up + i));
        if (sigmoid) store_floats(sigmoid + i, s);
    }
    for (; i < n; i++) {
        const float s = 1.0f / (1.0f + accurate_exp(-gate[i]));
        y[i] = gate[i] * s * up[i];
        if (sigmoid) sigmoid[i] = s;
    }
}

// d_gate and d_up from dy, the gradient of act(gate) * up.
inline void gate_backward(const float* gate, const float* up, const float* sigmoid, const float* dy, int n, bool relu2,
                          float* d_gate, float* d_up) {
    if (relu2) {
#pragma omp simd
        for (int i = 0; i < n; i++) {
            const float positive = std::max(gate[i], 0.0f), d = dy[i];
            d_gate[i] = d * up[i] * 2.0f * positive;
            d_up[i] = d * positive * positive;
        }
        return;
    }
#pragma omp simd
    for (int i = 0; i < n; i++) {
        const float s = sigmoid[i], d = dy[i], act = gate[i] * s;
        d_gate[i] = d * up[i] * (s + act * (1.0f - s));
        d_up[i] = d * act;
    }
}

inline void add(const float* x, const float* y, int64_t n, float* to) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = x[i] + y[i];
}

// Rotates the pairs (i, i + size / 2) of a head; backward, by the opposite angle. `to` may be the head itself.
inline void rotate(const float* head, const float* cos, const float* sin, int size, bool backward, float* to) {
    const int half = size / 2;
#pragma omp simd
    for (int i = 0; i < half; i++) {
        const float x = head[i], y = head[i + half];
        if (backward) {
            to[i] = x * cos[i] + y * sin[i + half];
            to[i + half] = y * cos[i + half] - x * sin[i];
        } else {
            to[i] = x * cos[i] - y * sin[i];
            to[i + half] = y * cos[i + half] + x * sin[i + half];
        }
    }
}
