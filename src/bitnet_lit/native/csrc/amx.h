// Products of float matrices on Intel's matrix unit (AMX), whose operands are bfloat16.
//
// A float32 is split into two bfloat16 numbers, x = high + low, which leaves an error of at most 2^-17 of x. Then
//
//     a * b ~= a_high * b_high + a_high * b_low + a_low * b_high
//
// summed in float32. The error of a product is below 2^-16 of it, about a hundredth of TF32's, and three products of
// this kind take a fifth of the time of one in float32. The unit multiplies tiles: 16 rows of 64 bytes.
//
// A panel (matmul.h) of 32 rows takes 4 KiB as floats, and the same when it is split: the high parts of columns 0..15
// and of 16..31, then the low parts, where bfloat16 numbers of two neighbouring rows are side by side.
#pragma once

#include "float_simd.h"
#include "transpose.h"

constexpr int AMX_SIZE = 128;  // rows and columns of a matrix from which on the unit is used

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__AVX512BF16__) && \
    defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

constexpr int BLOCK_FLOATS = 32 * 32;
constexpr int64_t REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

// Whether the system lets this process use the unit.
inline bool has_amx() {
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

// While it lives, this thread's tile registers are eight tiles of 16 x 64 bytes.
struct TileRegisters {
    TileRegisters() {
        if (!has_amx()) return;
        // Palette 1; the bytes of a row of each tile, as uint16, from byte 16 on; its rows from byte 48 on. It is
        // static, because GCC's intrinsic does not tell the optimizer that it reads all of it.
        alignas(64) static constexpr uint8_t config[64] = {
            1,  0, 0,  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 64, 0, 64, 0,  64, 0,  64, 0,  64, 0,
            64, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  0, 0,  0, 16, 16, 16, 16, 16, 16, 16, 16};
        _tile_loadconfig(config);
    }
    ~TileRegisters() {
        if (has_amx()) _tile_release();
    }
};

// Makes the compiler write to memory what it holds in registers: GCC does not know that tile loads read memory.
inline void before_tile_loads() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// Rounded to bfloat16, in the upper half of each lane.
inline __m512i upper_half(__m512 x) {
    const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    return _mm512_and_si512(rounded, _mm512_set1_epi32(int(0xffff0000)));
}
struct Halves {
    __m512i high, low;  // each in the upper half of a lane; what is below `low` is no part of it
};
inline Halves split(FloatVec x) {
    const __m512i high = upper_half((__m512)x), half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_castps_si512(_mm512_sub_ps((__m512)x, _mm512_castsi512_ps(high)));
    return {high, _mm512_add_epi32(low, half)};
}
// Two numbers of `split` as one of 32 bits: the first in the lower half.
inline __m512i pair_of(__m512i first, __m512i second) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(first, 16), second, upper, 0xF8);  // first | (second & upper)
}

// Splits 32 rows of a panel, in place.
inline void split_block(float* block) {
    alignas(64) uint32_t tiles[BLOCK_FLOATS];
    for (int pair = 0; pair < 16; pair++)
        for (int half = 0; half < 2; half++) {
            const float* const at = block + pair * 64 + half * 16;
            const Halves x = split(load_floats(at)), y = split(load_floats(at + 32));
            uint32_t* const to = tiles + half * 256 + pair * 16;
            _mm512_store_si512(to, pair_of(x.high, y.high));
            _mm512_store_si512(to + 512, pair_of(x.low, y.low));
        }
    std::memcpy(block, tiles, sizeof(tiles));
}

// Two neighbouring vectors of a row as 32 bfloat16 numbers, high and low.
inline void store_split(FloatVec first, FloatVec second, uint16_t* to) {
    alignas(64) static constexpr uint16_t ODD[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i odd = _mm512_load_si512(ODD);
    const Halves x = split(first), y = split(second);
    _mm512_store_si512(to, _mm512_permutex2var_epi16(x.high, odd, y.high));
    _mm512_store_si512(to + 512, _mm512_permutex2var_epi16(x.low, odd, y.low));
}

// 16 columns of 32 floats, of which the first `count` are there, as the rows of a tile: high and low parts. Two
// neighbours in a column make one element of 32 bits, so the transpose is one of 16 x 16 elements. Each of the 32 rows
// of floats is multiplied by its factor first, where there are `factors`.
inline void split_columns(const float* from, int64_t row, int count, uint16_t* to, const float* factors = nullptr) {
    const __mmask16 here = __mmask16((1u << count) - 1);
    FloatVec high[LANES], low[LANES];
#pragma GCC unroll 16
    for (int pair = 0; pair < LANES; pair++) {
        FloatVec first = (FloatVec)_mm512_maskz_loadu_ps(here, from + 2 * pair * row);
        FloatVec second = (FloatVec)_mm512_maskz_loadu_ps(here, from + (2 * pair + 1) * row);
        if (factors) first *= factors[2 * pair], second *= factors[2 * pair + 1];
        const Halves x = split(first), y = split(second);
        high[pair] = (FloatVec)pair_of(x.high, y.high);
        low[pair] = (FloatVec)pair_of(x.low, y.low);
    }
    transpose_vecs<LANES / 2>(high);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) _mm512_store_ps(to + i * 32, (__m512)high[i]);
    transpose_vecs<LANES / 2>(low);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) _mm512_store_ps(to + 512 + i * 32, (__m512)low[i]);
}

// `multiply_rounded` of rounded.h.
inline void multiply_rounded_tiles(int k, const uint16_t* tiles, const uint16_t* panel, float* c, int64_t ldc) {
    before_tile_loads();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (const uint16_t *a = tiles, *const end = tiles + 16 * k; a < end; a += 512, panel += 1024) {
        _tile_loadd(4, a, 64);
        _tile_loadd(5, a + 16 * k, 64);
        _tile_loadd(6, panel, 64);
        _tile_loadd(7, panel + 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + 16, ldc * 4);
    _tile_stored(2, c + 16 * ldc, ldc * 4);
    _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

// The product of 16 or 32 rows of A, split, and a panel of 32 columns; `blocks` of 32 columns of A each. EXACT: the
// numbers of the panel are bfloat16 numbers, as codes are. Then their low parts are zeros, and are not multiplied.
template <bool TWO, bool EXACT = false>
NOINLINE void multiply_tiles(int blocks, const uint16_t* a0, const uint16_t* a1, const float* panel, float* c,
                             int64_t ldc, int rows, int columns, bool accumulate) {
    constexpr int ROWS_HERE = TWO ? 32 : 16;
    alignas(64) float buffer[32 * 32];
    const bool is_whole = rows >= ROWS_HERE && columns >= 32;
    float* const to = is_whole ? c : buffer;
    const int64_t stride = (is_whole ? ldc : 32) * 4;
    for (int i = 0; is_whole && i < ROWS_HERE; i++) {  // they are here when the sums are stored
        __builtin_prefetch(to + i * ldc, 1);
        __builtin_prefetch(to + i * ldc + 16, 1);
    }
    if (accumulate && !is_whole)
        for (int i = 0; i < rows; i++) std::copy(c + i * ldc, c + i * ldc + std::min(32, columns), buffer + i * 32);
    before_tile_loads();
    if (accumulate) {
        _tile_loadd(0, to, stride);
        _tile_loadd(1, to + 16, stride);
        if (TWO) _tile_loadd(2, (char*)to + 16 * stride, stride);
        if (TWO) _tile_loadd(3, (char*)(to + 16) + 16 * stride, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (TWO) _tile_zero(2);
        if (TWO) _tile_zero(3);
    }
#define MULTIPLY_ALL             \
    _tile_dpbf16ps(0, 4, 6);     \
    _tile_dpbf16ps(1, 4, 7);     \
    if (TWO) {                   \
        _tile_dpbf16ps(2, 5, 6); \
        _tile_dpbf16ps(3, 5, 7); \
    }
    for (int block = 0; block < blocks; block++, a0 += 1024, a1 += 1024, panel += BLOCK_FLOATS) {
        const char* const b = (const char*)panel;
        _tile_loadd(4, a0, 64);  // high
        if (TWO) _tile_loadd(5, a1, 64);
        if (!EXACT) {
            _tile_loadd(6, b + 2048, 64);  // low
            _tile_loadd(7, b + 3072, 64);
            MULTIPLY_ALL
        }
        _tile_loadd(6, b, 64);  // high
        _tile_loadd(7, b + 1024, 64);
        MULTIPLY_ALL
        _tile_loadd(4, a0 + 512, 64);  // low
        if (TWO) _tile_loadd(5, a1 + 512, 64);
        MULTIPLY_ALL
    }
#undef MULTIPLY_ALL
    _tile_stored(0, to, stride);
    _tile_stored(1, to + 16, stride);
    if (TWO) _tile_stored(2, (char*)to + 16 * stride, stride);
    if (TWO) _tile_stored(3, (char*)(to + 16) + 16 * stride, stride);
    if (!is_whole)
        for (int i = 0; i < rows; i++) std::copy(buffer + i * 32, buffer + i * 32 + std::min(32, columns), c + i * ldc);
}

// Rows m of C = A @ one panel, for A in tiles: 16 rows and 32 columns each, 2 KiB with their low parts.
template <bool EXACT = false>
inline void multiply_split_panel(int m, int columns, int k, const uint16_t* a, const float* panel, float* c,
                                 int64_t ldc, bool accumulate) {
    const int blocks = k / 32;
    for (int i = 0; i < m; i += 32, a += 2048 * blocks) {
        const auto multiply = m - i > 16 ? multiply_tiles<true, EXACT> : multiply_tiles<false, EXACT>;
        multiply(blocks, a, a + (m - i > 16 ? 1024 * blocks : 0), panel, c + i * ldc, ldc, m - i, columns, accumulate);
    }
}

// The integer products of 32 rows of signed bytes and a panel of 32 columns, in which four neighbouring rows of
// unsigned bytes are side by side. `blocks` of 64 bytes of a row each. to: (32, 32).
inline void multiply_bytes(int blocks, const int8_t* a, int64_t row, const uint8_t* panel, int32_t* to) {
    before_tile_loads();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int block = 0; block < blocks; block++, a += 64, panel += 16 * 128) {
        _tile_loadd(4, a, row);
        _tile_loadd(5, a + 16 * row, row);
        _tile_loadd(6, panel, 128);
        _tile_loadd(7, panel + 64, 128);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, to, 128);
    _tile_stored(1, to + 16, 128);
    _tile_stored(2, to + 16 * 32, 128);
    _tile_stored(3, to + 16 * 32 + 16, 128);
}

#else

inline bool has_amx() { return false; }
struct TileRegisters {};
inline void split_block(float*) {}
inline void store_split(FloatVec, FloatVec, uint16_t*) {}
inline void split_columns(const float*, int64_t, int, uint16_t*, const float* = nullptr) {}
inline void multiply_rounded_tiles(int, const uint16_t*, const uint16_t*, float*, int64_t) {}
inline void multiply_bytes(int, const int8_t*, int64_t, const uint8_t*, int32_t*) {}
template <bool, bool = false>
inline void multiply_tiles(int, const uint16_t*, const uint16_t*, const float*, float*, int64_t, int, int, bool) {}
template <bool = false>
inline void multiply_split_panel(int, int, int, const uint16_t*, const float*, float*, int64_t, bool) {}

#endif
