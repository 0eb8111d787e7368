// The key/value cache of one text, in float32, float16 or int8.
//
// Keys lie in blocks of LANES positions, element by element of the head, so that one vector holds the same element of
// LANES keys, and accumulating over elements gives LANES scores. Values lie position by position. Neither needs a
// horizontal sum. In int8 each key and each value of a head has a scale of its own. With LANES = 4 and head_dim = 2,
// for example:
//
//     keys      k0[0] k1[0] k2[0] k3[0]  k0[1] k1[1] k2[1] k3[1]  k4[0] k5[0] ...
//     values    v0[0] v0[1] -     -      v1[0] v1[1] -     -      ...              (padded to whole vectors)
#pragma once

#include <memory>
#include <vector>

#include "buffer.h"
#include "float_simd.h"

enum CacheType : int32_t { CACHE_FLOAT, CACHE_HALF, CACHE_INT8 };

struct CacheShape {
    int kv_heads, head_dim, context;  // kv_heads: of all layers together
    CacheType type;
    bool scaled() const { return type == CACHE_INT8; }
    int width() const { return round_up(head_dim, LANES); }  // elements of a value in memory
    size_t element() const { return type == CACHE_FLOAT ? 4 : type == CACHE_HALF ? 2 : 1; }
};

struct Cache {
    int length = 0, room = 0;  // positions in use, positions allocated (a multiple of LANES)
    std::unique_ptr<Buffer<uint8_t>> keys, values;
    std::unique_ptr<Buffer<float>> key_scales, value_scales;

    void grow(const CacheShape& s, int needed) {
        if (needed <= room) return;
        resize(s, round_up(std::min(std::max({needed, 2 * room, 64}), s.context), LANES), *this);
    }

    // Memory for `positions`, with what `from` holds. Where memory ends, nothing is changed.
    void resize(const CacheShape& s, int positions, const Cache& from) {
        const size_t old = size_t(from.room), now = size_t(positions), scales = s.scaled() ? 1 : 0;
        auto new_keys = copied(from.keys, s.kv_heads, old * s.head_dim * s.element(), now * s.head_dim * s.element());
        auto new_values = copied(from.values, s.kv_heads, old * s.width() * s.element(), now * s.width() * s.element());
        auto new_key_scales = copied(from.key_scales, s.kv_heads, old * scales, now * scales);
        auto new_value_scales = copied(from.value_scales, s.kv_heads, old * scales, now * scales);
        keys = std::move(new_keys), values = std::move(new_values);
        key_scales = std::move(new_key_scales), value_scales = std::move(new_value_scales);
        room = positions;
    }

    // A buffer with `now` elements for each head; its first `old` are copied from `from`.
    template <class T>
    static std::unique_ptr<Buffer<T>> copied(const std::unique_ptr<Buffer<T>>& from, int heads, size_t old,
                                             size_t now) {
        auto bigger = std::make_unique<Buffer<T>>(heads * now);
        for (int i = 0; i < heads && old; i++) std::memcpy(*bigger + i * now, *from + i * old, old * sizeof(T));
        return bigger;
    }

    Cache* fork(const CacheShape& s) const {
        auto other = std::make_unique<Cache>();
        other->resize(s, room, *this);
        other->length = length;
        return other.release();
    }
};

inline float scale_of(const float* x, int n, const int8_t*) { return std::max(abs_max(x, n), 1e-12f) / 127.0f; }
inline float scale_of(const float*, int, const void*) { return 1; }  // float32 and float16 have none
inline void store_element(float* to, float value, float) { *to = value; }
inline void store_element(float16* to, float value, float) { *to = to_float16(value); }
inline void store_element(int8_t* to, float value, float scale) { *to = int8_t(round_clamped(value / scale, 127.0f)); }

// Stores the rotated key and the value of one position of a key/value head.
template <class E>
inline void store_kv(Cache& c, const CacheShape& s, int head, int position, const float* key, const float* value) {
    const int p = s.head_dim;
    const size_t row = size_t(head) * c.room;
    E* keys = (E*)c.keys->data + row * p + size_t(position / LANES) * LANES * p + position % LANES;
    E* values = (E*)c.values->data + (row + position) * s.width();
    const float key_scale = scale_of(key, p, keys), value_scale = scale_of(value, p, values);
    for (int i = 0; i < p; i++) store_element(keys + size_t(i) * LANES, key[i], key_scale);
    for (int i = 0; i < p; i++) store_element(values + i, value[i], value_scale);
    if (s.scaled()) (*c.key_scales)[row + position] = key_scale, (*c.value_scales)[row + position] = value_scale;
}
