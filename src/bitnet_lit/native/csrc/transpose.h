// The transpose of LANES x LANES numbers of 32 bits in registers.
#pragma once

#include <utility>

#include "float_simd.h"

// The transpose of LANES x LANES floats, by exchanging ever smaller blocks.
template <int HALF, int... L>
inline void exchange(FloatVec& x, FloatVec& y, std::integer_sequence<int, L...>) {
    const FloatVec low = __builtin_shufflevector(x, y, (L & HALF ? LANES + L - HALF : L)...);
    const FloatVec high = __builtin_shufflevector(x, y, (L & HALF ? LANES + L : L + HALF)...);
    x = low, y = high;
}
template <int HALF>
inline void transpose_vecs(FloatVec (&rows)[LANES]) {
    if constexpr (HALF > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & HALF)) exchange<HALF>(rows[i], rows[i + HALF], std::make_integer_sequence<int, LANES>{});
        transpose_vecs<HALF / 2>(rows);
    }
}
