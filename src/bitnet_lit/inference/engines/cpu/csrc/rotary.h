// Rotary position embeddings (RoPE: Su et al. 2021, arXiv:2104.09864): elements i and i + head_dim / 2 of a query or
// key are rotated by position * theta^(-2 i / head_dim), as Hugging Face's Llama does it.
#pragma once

#include "buffer.h"
#include "float_simd.h"

struct RotaryTable {
    Buffer<float> cosine, sine;  // (positions, head_dim / 2)
    int positions = 0;

    // Angles of the first `needed` positions. Tables grow with the texts: a context can be long, and a text short.
    void reserve(int needed, int head_dim, int context, float theta) {
        if (needed <= positions) return;
        const int half = head_dim / 2, room = std::min(std::max({needed, 2 * positions, 64}), context);
        positions = 0;  // in case that memory ends half-way
        cosine.reset(size_t(room) * half), sine.reset(size_t(room) * half);
        for (int p = 0; p < room; p++)
            for (int i = 0; i < half; i++) {
                const float angle = float(p) * (1.0f / std::pow(theta, float(2 * i) / float(head_dim)));
                cosine[size_t(p) * half + i] = std::cos(angle), sine[size_t(p) * half + i] = std::sin(angle);
            }
        positions = room;
    }

    // Rotates one head of a token.
    NOINLINE void rotate(float* head, int head_dim, int position) const {
        const int half = head_dim / 2;
        const float *c = cosine + size_t(position) * half, *n = sine + size_t(position) * half;
        for (int i = 0; i < half; i++) {
            const float a = head[i], b = head[i + half];
            head[i] = a * c[i] - b * n[i], head[i + half] = b * c[i] + a * n[i];
        }
    }
};
