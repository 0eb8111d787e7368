// A model as Python describes it to the engine: the structures of native.py, field by field.
//
// Pointers are to memory that Python keeps for as long as the engine lives.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <exception>
#include <vector>

#include "dense_matmul.h"
#include "lm_head_quantize.h"

extern "C" {

struct Shape {
    int32_t hidden, layers, heads, kv_heads, head_dim, ffn, vocab, context;  // numbers of elements
    int32_t pieces;      // rows of the vocabulary that have a token: the first ones. A padded vocabulary has more
    int32_t relu2;       // the activation function is the square of ReLU; otherwise SiLU
    int32_t dense;       // projections are float matrices; otherwise they are ternary
    int32_t head_bits;   // of the output head: 4, 8, or 32 for float
    int32_t cache_type;  // CacheType of kv_cache.h
    int32_t threads;
    float eps, rope_theta;
};

// A matrix (O, I) that a step reads from beginning to end. One of the three pointers is not null.
struct Matrix {
    const uint8_t* packed;  // ternary, in the layout of packing.h; times `scale`
    const float* floats;
    const bfloat16* bfloats;
    float scale;
};

// A dense matrix (vocab, hidden) of which a step reads only some rows: the embedding, and rows of the output head. A
// large one stays in its file. Its rows are read, not mapped: if another program shortens a mapped file, the next
// access ends the process (SIGBUS); a read just comes back short.
struct RowTable {
    const void* memory;  // null where the table is in a file
    int64_t offset;      // of the first row in the file
    int32_t file;        // descriptor
    int32_t is_bfloat16;

    size_t row_bytes(int inputs) const { return size_t(inputs) * (is_bfloat16 ? sizeof(bfloat16) : sizeof(float)); }
};

constexpr int VALUE_GATE_INPUTS = 32;  // elements of a token that a gate reads, at most

struct Layer {
    const float* value_gate;                 // (kv_heads, min(VALUE_GATE_INPUTS, hidden)) of value embeddings, or null
    const float *residual_scale, *x0_scale;  // one number each: r and s of x = r * x + s * x0; null where it has none
    // Null where the network has no such norm. q_norm and k_norm (head_dim) are of each head.
    const float *input_norm, *q_norm, *k_norm, *attn_norm, *post_norm, *ffn_norm;
    RowTable value_table;  // (vocab, kv_heads * head_dim), where there is a gate
    Matrix q, k, v, o, gate, up, down;
};

struct Weights {
    RowTable embedding, head_rows;  // head_rows: the exact rows of the output head, where head_bits is 4 or 8
    Matrix head;                    // where head_bits is 32
    const float* norm;
    const uint8_t* head_codes;  // lm_head_quantize.h, where head_bits is 4 or 8
    const HeadPanel* head_panels;
    const int8_t* head_int8_rows;  // (vocab, padded hidden), where head_bits is 4
};
}

// Calls use(elements) with the float32 or bfloat16 numbers of a dense matrix.
template <class Use>
inline void with_elements(const Matrix& matrix, const Use& use) {
    if (matrix.floats) use(matrix.floats);
    else use(matrix.bfloats);
}

struct ShortRead : std::exception {};  // the file of a RowTable is shorter than it was, or cannot be read any more

// Calls use(row) with a pointer to row `index` of `inputs` float32 or bfloat16 numbers, valid during the call. Throws
// ShortRead.
template <class Use>
inline void with_row(const RowTable& table, int index, int inputs, const Use& use) {
    const size_t bytes = table.row_bytes(inputs);
    const char* row = (const char*)table.memory + index * bytes;
    if (!table.memory) {
        thread_local std::vector<char> copy;
        copy.resize(bytes);
        for (size_t done = 0; done < bytes;) {
            const off_t at = off_t(table.offset + index * bytes + done);
            const ssize_t got = pread(table.file, copy.data() + done, bytes - done, at);
            if (got > 0) done += size_t(got);
            else if (got == 0 || errno != EINTR) throw ShortRead();
        }
        row = copy.data();
    }
    if (table.is_bfloat16) use((const bfloat16*)row);
    else use((const float*)row);
}
