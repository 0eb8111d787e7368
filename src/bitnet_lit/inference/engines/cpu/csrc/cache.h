// Keys and values of one text, as float32, float16 or int8.
//
// Keys lie in blocks of LANES positions, dimension by dimension, so that a vector is LANES scores in the making; values
// lie position by position. Nothing is summed across a vector. As int8 each position of each head has a scale of its
// own for its key and for its value: a quarter of the memory.
#pragma once

#include <memory>
#include <vector>

#include "floats.h"

enum CacheType : int32_t { CACHE_FLOAT, CACHE_HALF, CACHE_INT8 };

struct CacheShape {
    int lanes, head_dim, context;  // a lane is a key/value head of a layer
    CacheType type;
    bool scaled() const { return type == CACHE_INT8; }
    int width() const { return round_up(head_dim, LANES); }  // of a value, in memory
    size_t element() const { return type == CACHE_FLOAT ? 4 : type == CACHE_HALF ? 2 : 1; }
};

struct Cache {
    int length = 0, room = 0;  // positions: used, allocated (a multiple of LANES)
    std::unique_ptr<Buffer<uint8_t>> keys, values;
    std::unique_ptr<Buffer<float>> key_scales, value_scales;

    void grow(const CacheShape& s, int needed) {
        if (needed <= room) return;
        resize(s, round_up(std::min(std::max({needed, 2 * room, 64}), s.context), LANES), *this);
    }

    // Room for `positions`, with what `from` holds; all of it, or, where memory ends, nothing is changed.
    void resize(const CacheShape& s, int positions, const Cache& from) {
        const size_t old = size_t(from.room), now = size_t(positions), numbers = s.scaled() ? 1 : 0;
        auto new_keys = moved(from.keys, s.lanes, old * s.head_dim * s.element(), now * s.head_dim * s.element());
        auto new_values = moved(from.values, s.lanes, old * s.width() * s.element(), now * s.width() * s.element());
        auto new_key_scales = moved(from.key_scales, s.lanes, old * numbers, now * numbers);
        auto new_value_scales = moved(from.value_scales, s.lanes, old * numbers, now * numbers);
        keys = std::move(new_keys), values = std::move(new_values);
        key_scales = std::move(new_key_scales), value_scales = std::move(new_value_scales);
        room = positions;
    }

    template <class T>
    static std::unique_ptr<Buffer<T>> moved(const std::unique_ptr<Buffer<T>>& from, int lanes, size_t old, size_t now) {
        auto bigger = std::make_unique<Buffer<T>>(lanes * now);
        for (int i = 0; i < lanes && old; i++) std::memcpy(*bigger + i * now, *from + i * old, old * sizeof(T));
        return bigger;
    }

    Cache* fork(const CacheShape& s) const {
        auto other = std::make_unique<Cache>();
        other->resize(s, room, *this);
        other->length = length;
        return other.release();
    }
};

inline float scale_of(const float* x, int n, const int8_t*) {
    return std::max(largest_magnitude(x, n), 1e-12f) / 127.0f;
}
inline float scale_of(const float*, int, const void*) { return 1; }
inline void store_element(float* to, float value, float) { *to = value; }
inline void store_element(float16* to, float value, float) { *to = to_float16(value); }
inline void store_element(int8_t* to, float value, float scale) { *to = int8_t(code_of(value / scale, 127.0f)); }

// Put a (rotated) key and its value to `position` of a lane.
template <class E>
inline void put(Cache& c, const CacheShape& s, int lane, int position, const float* key, const float* value) {
    const int p = s.head_dim;
    const size_t row = size_t(lane) * c.room;
    E* keys = (E*)c.keys->data + row * p + size_t(position / LANES) * LANES * p + position % LANES;
    E* values = (E*)c.values->data + (row + position) * s.width();
    const float key_scale = scale_of(key, p, keys), value_scale = scale_of(value, p, values);
    for (int i = 0; i < p; i++) store_element(keys + size_t(i) * LANES, key[i], key_scale);
    for (int i = 0; i < p; i++) store_element(values + i, value[i], value_scale);
    if (s.scaled()) (*c.key_scales)[row + position] = key_scale, (*c.value_scales)[row + position] = value_scale;
}
