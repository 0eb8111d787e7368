// Products of matrices that are rounded to bfloat16, summed in float32: on Intel's matrix unit (amx.h), or by AVX-512's
// dot products of pairs (AMD from Zen 4 on, Intel from Cooper Lake on), which take half of the time of float32.
//
// A matrix is rounded once. Its tiles become its panels, and those of its transpose, without the floats.
#pragma once

#include "amx.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

constexpr bool HAS_BFLOAT16 = true;

// Tiles of A (m x k), 16 rows and 32 columns each. m and k are multiples of 32, here and in the next three functions.
inline void round_rows(int m, int k, const float* a, uint16_t* tiles) {
    for (int i = 0; i < m; i += 16)
        for (int p = 0; p < k; p += 32)
            for (int r = 0; r < 16; r++, tiles += 32) {
                const float* const at = a + int64_t(i + r) * k + p;
                const __m512 x = _mm512_loadu_ps(at), y = _mm512_loadu_ps(at + 16);
                _mm512_store_si512(tiles, (__m512i)_mm512_cvtne2ps_pbh(y, x));
            }
}

// Panels of B = A from its tiles. Those of 32 columns follow each other: of each 32 rows, two halves of 16 columns, in
// which two neighbouring rows are side by side.
inline void panels_of_tiles(int m, int k, const uint16_t* tiles, uint16_t* panels) {
    alignas(64) static constexpr uint16_t LEFT[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i left = _mm512_load_si512(LEFT), right = _mm512_add_epi16(left, _mm512_set1_epi16(16));
    for (int i = 0; i < m; i += 16)
        for (int p = 0; p < k; p += 32)
            for (int pair = 0; pair < 8; pair++, tiles += 64) {
                const __m512i x = _mm512_load_si512(tiles), y = _mm512_load_si512(tiles + 32);
                uint16_t* const to = panels + int64_t(p) * m + i / 32 * 1024 + (i % 32 / 2 + pair) * 32;
                _mm512_store_si512(to, _mm512_permutex2var_epi16(x, left, y));
                _mm512_store_si512(to + 512, _mm512_permutex2var_epi16(x, right, y));
            }
}

// The same for the transpose of A.
inline void transposed_panels_of_tiles(int m, int k, const uint16_t* tiles, uint16_t* panels) {
    for (int i = 0; i < m; i += 16)
        for (int p = 0; p < k; p += 32, tiles += 512) {
            uint16_t* const to = panels + int64_t(i / 32) * 32 * k + p * 32 + i % 32 / 16 * 512;
            FloatVec rows[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) rows[r] = (FloatVec)_mm512_load_ps(tiles + r * 32);
            transpose_vecs<LANES / 2>(rows);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) _mm512_store_ps(to + r * 32, (__m512)rows[r]);
        }
}

// c (32, 32) = 32 rows of A, in tiles, @ a panel; k columns of A.
inline void multiply_rounded(int k, const uint16_t* tiles, const uint16_t* panel, float* c, int64_t ldc) {
    if (has_amx()) return multiply_rounded_tiles(k, tiles, panel, c, ldc);
    constexpr int R = 8;  // rows whose sums are in registers
    for (int top = 0; top < 32; top += R) {
        __m512 sums[R][2] = {};
        const uint16_t *a = tiles + top / 16 * 16 * k + top % 16 * 32, *b = panel;
        for (const uint16_t* const end = a + 16 * k; a < end; a += 512, b += 1024)
            for (int pair = 0; pair < 16; pair++) {
                const __m512bh left = (__m512bh)_mm512_load_si512(b + pair * 32);
                const __m512bh right = (__m512bh)_mm512_load_si512(b + 512 + pair * 32);
#pragma GCC unroll 16
                for (int i = 0; i < R; i++) {
                    int32_t two;
                    std::memcpy(&two, a + i * 32 + pair * 2, 4);
                    const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
                    sums[i][0] = _mm512_dpbf16_ps(sums[i][0], x, left);
                    sums[i][1] = _mm512_dpbf16_ps(sums[i][1], x, right);
                }
            }
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) {
            _mm512_storeu_ps(c + (top + i) * ldc, sums[i][0]);
            _mm512_storeu_ps(c + (top + i) * ldc + 16, sums[i][1]);
        }
    }
}

#else

constexpr bool HAS_BFLOAT16 = false;
inline void round_rows(int, int, const float*, uint16_t*) {}
inline void panels_of_tiles(int, int, const uint16_t*, uint16_t*) {}
inline void transposed_panels_of_tiles(int, int, const uint16_t*, uint16_t*) {}
inline void multiply_rounded(int, const uint16_t*, const uint16_t*, float*, int64_t) {}

#endif
