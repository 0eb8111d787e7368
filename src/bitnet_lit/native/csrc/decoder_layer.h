// A whole decoder layer: attention and the gated feed-forward layer, each behind its norm and added to its input.
//
//     middle = x + o(sub_norm(attention(qkv(norm(x))))); y = middle + mlp(middle)
//
// It calls the functions of the other headers one after the other. What the backward pass reads lies in one block of
// memory, and the gradients of all parameters in another, so that Python has few tensors to make.
//
// Letters: M tokens, D hidden, A numbers of all heads of a token, K of its heads of keys, F feed-forward.
#pragma once

#include "attention.h"
#include "gated_mlp.h"
#include "linears.h"

struct DecoderLayer {
    int32_t batch, length, hidden, ffn, heads, kv_heads, head_dim, relu2, quantized, int8, threads;
    float limit;
    Fork fork;
    Matrix matrices[7];  // q, k, v, o, gate, up, down
    Norm norms[4];       // before q, o, gate and down; `rstd` is set here
    const float *cos, *sin, *x;
    float* y;
    float* kept;  // for the backward pass: kept_floats numbers
    int64_t kept_floats;
    const float* d_y;
    float *d_x, *d_parameters;  // of the matrices, then of the norms, without gaps
};

// Parts of a block of memory. Without a block they are only counted.
class Parts {
   public:
    explicit Parts(float* block) : block_(block) {}
    float* take(int64_t floats) {
        float* const part = block_ ? block_ + floats_ : nullptr;
        floats_ += (floats + LANES - 1) / LANES * LANES;
        return part;
    }
    Activations take(int tokens, int inputs, bool quantized) {
        if (!quantized) return {nullptr, nullptr, take(int64_t(tokens) * inputs)};
        int8_t* const codes = reinterpret_cast<int8_t*>(take((int64_t(tokens) * inputs + 3) / 4));
        return {codes, take(tokens), nullptr};
    }
    int64_t floats() const { return floats_; }

   private:
    float* const block_;
    int64_t floats_ = 0;
};

// The four steps of a layer, with their memory.
struct LayerSteps {
    Linears qkv{}, o{};
    Attention attention{};
    GatedMlp mlp{};

    explicit LayerSteps(DecoderLayer& a) {
        const int M = a.batch * a.length, D = a.hidden, F = a.ffn;
        const int A = a.heads * a.head_dim, K = a.kv_heads * a.head_dim, row = A + 2 * K;
        Parts kept(a.kept);
        for (Norm& norm : a.norms) norm.rstd = kept.take(M);
        const auto fill = [&](auto& step) {
            step.tokens = M, step.quantized = a.quantized, step.int8 = a.int8, step.limit = a.limit;
            step.threads = a.threads, step.fork = a.fork;
        };
        fill(qkv), fill(o), fill(mlp);

        qkv.inputs = D, qkv.count = 3, std::copy(a.matrices, a.matrices + 3, qkv.matrices);
        qkv.norm = a.norms[0], qkv.h = kept.take(M, D, a.quantized);
        qkv.x = a.x, qkv.y = kept.take(int64_t(M) * row);

        attention.batch = a.batch, attention.length = a.length, attention.threads = a.threads, attention.fork = a.fork;
        attention.heads = a.heads, attention.kv_heads = a.kv_heads, attention.head_dim = a.head_dim;
        attention.row = attention.d_row = row, attention.cos = a.cos, attention.sin = a.sin;
        attention.q = qkv.y, attention.k = qkv.y + A, attention.v = qkv.y + A + K;
        attention.y = kept.take(int64_t(M) * A), attention.log_sum = kept.take(int64_t(M) * a.heads);

        o.inputs = A, o.count = 1, o.matrices[0] = a.matrices[3];
        o.norm = a.norms[1], o.h = kept.take(M, A, a.quantized);
        o.x = attention.y, o.residual = a.x, o.y = kept.take(int64_t(M) * D);

        mlp.hidden = D, mlp.ffn = F, mlp.relu2 = a.relu2;
        mlp.gate_up[0] = a.matrices[4], mlp.gate_up[1] = a.matrices[5], mlp.down = a.matrices[6];
        mlp.norm = a.norms[2], mlp.h = kept.take(M, D, a.quantized);
        mlp.sub_norm = a.norms[3], mlp.hf = kept.take(M, F, a.quantized);
        mlp.gates = kept.take(int64_t(M) * 2 * F);
        mlp.x = mlp.residual = o.y, mlp.y = a.y;
        a.kept_floats = kept.floats();
    }

    // Where the gradients of the steps go. Those of numbers that only the layer sees are in scratch memory.
    void point_gradients(const DecoderLayer& a) {
        const int64_t M = qkv.tokens, D = a.hidden, F = a.ffn, A = o.inputs, K = a.kv_heads * a.head_dim;
        float* const d_middle = scratch(22, M * (D + A + A + 2 * K));
        float *const d_heads = d_middle + M * D, *const d_qkv = d_heads + M * A;
        mlp.d_y = mlp.d_residual = a.d_y, mlp.d_x = d_middle;
        o.d_y = d_middle, o.d_y_row = D, o.d_x = d_heads;
        attention.d_y = d_heads, attention.d_q = d_qkv, attention.d_k = d_qkv + A, attention.d_v = d_qkv + A + K;
        qkv.d_y = d_qkv, qkv.d_y_row = A + 2 * K, qkv.d_residual = d_middle, qkv.d_x = a.d_x;

        float* next = a.d_parameters;
        const auto take = [&](int64_t floats) { return std::exchange(next, next + floats); };
        qkv.d_weight = take((A + 2 * K) * D), o.d_weight = take(D * A);
        mlp.d_gate_up = take(2 * F * D), mlp.d_down = take(D * F);
        const auto take_gain = [&](const Norm& norm, int64_t size) { return norm.weight ? take(size) : nullptr; };
        qkv.d_norm = take_gain(qkv.norm, D), o.d_norm = take_gain(o.norm, A);
        mlp.d_norm = take_gain(mlp.norm, D), mlp.d_sub_norm = take_gain(mlp.sub_norm, F);
    }
};

inline void decoder_layer_forward(DecoderLayer& a) {
    LayerSteps steps(a);
    if (!a.kept) return;  // only `kept_floats` is asked for
    linears_forward(steps.qkv);
    attention_forward(steps.attention);
    linears_forward(steps.o);
    gated_mlp_forward(steps.mlp);
}

inline void decoder_layer_backward(DecoderLayer& a) {
    LayerSteps steps(a);
    steps.point_gradients(a);
    gated_mlp_backward(steps.mlp);
    linears_backward(steps.o);
    attention_backward(steps.attention);
    linears_backward(steps.qkv);
}
