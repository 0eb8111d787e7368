// Keys and values of one text, and attention over them.
//
// Keys lie in blocks of 16 positions, dimension by dimension, so that a vector is 16 scores in the making; values in blocks
// of 16 dimensions, position by position, so that a vector is a piece of the result. Nothing is summed across a vector.
// As int8 each position of each head has a scale of its own for its key and for its value: a quarter of the memory.
#pragma once

#include <memory>
#include <vector>

#include "floats.h"

struct CacheShape {
    int lanes, head_dim, context;  // a lane is a key/value head of a layer
    bool int8;
    int width() const { return round_up(head_dim, LANES); }
    size_t element() const { return int8 ? sizeof(int8_t) : sizeof(float); }
};

struct Cache {
    int length = 0, room = 0;  // positions: used, allocated (a multiple of 16)
    std::unique_ptr<Buffer<uint8_t>> keys, values;
    std::unique_ptr<Buffer<float>> key_scales, value_scales;

    void grow(const CacheShape& s, int needed) {
        if (needed <= room) return;
        const int now = round_up(std::min(std::max({needed, 2 * room, 256}), s.context), LANES);
        keys = moved(std::move(keys), s.lanes, size_t(room) * s.head_dim * s.element(), size_t(now) * s.head_dim * s.element());
        const size_t piece = LANES * s.element();
        values = moved(std::move(values), size_t(s.lanes) * s.width() / LANES, room * piece, now * piece);
        if (s.int8) {
            key_scales = moved(std::move(key_scales), s.lanes, room, now);
            value_scales = moved(std::move(value_scales), s.lanes, room, now);
        }
        room = now;
    }

    template <class T>
    static std::unique_ptr<Buffer<T>> moved(std::unique_ptr<Buffer<T>> from, size_t pieces, size_t old, size_t now) {
        auto bigger = std::make_unique<Buffer<T>>(pieces * now);
        for (size_t i = 0; i < pieces && old; i++) std::memcpy(*bigger + i * now, *from + i * old, old * sizeof(T));
        return bigger;
    }

    Cache* fork(const CacheShape& s) const {
        Cache* other = new Cache;
        if (room) {
            other->grow(s, room);
            std::memcpy(*other->keys, *keys, size_t(s.lanes) * room * s.head_dim * s.element());
            std::memcpy(*other->values, *values, size_t(s.lanes) * room * s.width() * s.element());
            if (s.int8) {
                std::memcpy(*other->key_scales, *key_scales, size_t(s.lanes) * room * sizeof(float));
                std::memcpy(*other->value_scales, *value_scales, size_t(s.lanes) * room * sizeof(float));
            }
        }
        other->length = length;
        return other;
    }
};

// A vector of one head as numbers to store: as they are, or rounded to int8 with the scale that is returned.
inline float rounded(const float* from, int n, float* out) { std::memcpy(out, from, size_t(n) * sizeof(float)); return 1; }
inline float rounded(const float* from, int n, int8_t* out) {
    const float scale = std::max(largest_magnitude(from, n), 1e-12f) / 127.0f;
    for (int i = 0; i < n; i++) out[i] = int8_t(std::nearbyint(from[i] / scale));
    return scale;
}

// Put a (rotated) key and its value to `position` of a lane.
template <class E>
inline void put(Cache& c, const CacheShape& s, int lane, int position, const float* key, const float* value, E* scratch) {
    const int p = s.head_dim, block = position / LANES, at = position % LANES;
    const size_t row = size_t(lane) * c.room;
    const float key_scale = rounded(key, p, scratch);
    E* keys = (E*)c.keys->data + row * p + size_t(block) * LANES * p + at;
    for (int i = 0; i < p; i++) keys[i * LANES] = scratch[i];
    const float value_scale = rounded(value, p, scratch);
    E* values = (E*)c.values->data + row * s.width() + size_t(position) * LANES;
    for (int i = 0; i < p; i++) values[size_t(i / LANES) * c.room * LANES + i % LANES] = scratch[i];
    if (s.int8) (*c.key_scales)[row + position] = key_scale, (*c.value_scales)[row + position] = value_scale;
}

// One query over the first n positions of a lane: softmax(query . keys / sqrt(P)) . values. `scores` has room for n rounded
// up to whole blocks.
template <class E>
ONCE void attend(const Cache& c, const CacheShape& s, int lane, int n, const float* query, float* scores, float* out) {
    const int p = s.head_dim, whole = round_up(n, LANES);
    const size_t row = size_t(lane) * c.room;
    const float scale = 1.0f / std::sqrt(float(p));
    const E* keys = (const E*)c.keys->data + row * p;
    for (int j = 0; j < whole; j += LANES, keys += LANES * p) {
        Floats even{}, odd{};  // head_dim is even
        for (int i = 0; i < p; i += 2) {
            even += query[i] * load_floats(keys + i * LANES);
            odd += query[i + 1] * load_floats(keys + (i + 1) * LANES);
        }
        Floats sum = (even + odd) * scale;
        if (s.int8) sum *= load_floats(*c.key_scales + row + j);
        store_floats(scores + j, sum);
    }
    float largest = -INFINITY, total = 0;
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < n; j++) largest = std::max(largest, scores[j]);
    for (int j = n; j < whole; j++) scores[j] = -INFINITY;
#pragma omp simd reduction(+ : total)
    for (int j = 0; j < whole; j++) {
        scores[j] = j < n ? fast_exp(scores[j] - largest) : 0.0f;
        total += scores[j];
    }
    if (s.int8)
        for (int j = 0; j < n; j++) scores[j] *= (*c.value_scales)[row + j];
    const E* values = (const E*)c.values->data + row * s.width();
    for (int i = 0; i < p; i += LANES, values += size_t(c.room) * LANES) {
        Floats sums[4]{};
        for (int j = 0; j < whole; j += 4)
            for (int k = 0; k < 4; k++) sums[k] += scores[j + k] * load_floats(values + size_t(j + k) * LANES);
        float part[LANES];
        store_floats(part, ((sums[0] + sums[1]) + (sums[2] + sums[3])) / total);
        std::memcpy(out + i, part, size_t(std::min(LANES, p - i)) * sizeof(float));
    }
}
