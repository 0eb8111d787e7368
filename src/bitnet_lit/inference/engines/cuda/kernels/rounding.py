"""RMSNorm and rounding of one token, as the first part of a product or as a kernel of its own.

A token x is multiplied by the weight of its norm and rounded by its largest magnitude::

    v = x * norm_weight                   r = 1 / sqrt(mean(x**2) + eps)
    codes = round(v * LIMIT / max(abs(v)))      x ~= codes * (r * max(abs(v)) / LIMIT)

The factor r is the same for all elements of a token, so codes need it only where the clamp of the scale acts. LIMIT is
127 for the projections (`quant.activations.AbsMax`), and 32512 = 127 * 256 for the output head, whose codes of 16 bits
are two words of bytes: code = 256 * high + low, with high and low from -128 to 127.

Codes leave as words of four bytes in the order of `..layout`: byte b of word t of plane c is input (4 c + b) T + t. So
neighbouring lanes read neighbouring inputs, and nothing is exchanged between lanes.
"""

import triton
import triton.language as tl

MAGIC: tl.constexpr = tl.constexpr(
    12582912.0
)  # 1.5 * 2**23: adding it rounds to the nearest even integer, in the low bits
SCALE_MIN: tl.constexpr = tl.constexpr(1e-5)  # quant.activations.SCALE_MIN


@triton.jit
def activation(gate, ACT: tl.constexpr):
    """silu or relu2 of a tensor."""
    if ACT == "relu2":
        positive = tl.maximum(gate, 0.0)
        return positive * positive
    return tl.fdiv(gate, 1.0 + tl.exp(-gate))


@triton.jit
def load_input(x_ptr, n, mask, F, ACT: tl.constexpr):
    """x[n]; with ACT, act(x[n]) * x[n + F]: the gate and the other half of a gated layer."""
    x = tl.load(x_ptr + n, mask=mask, other=0.0).to(tl.float32)
    if ACT != "":
        x = activation(x, ACT) * tl.load(x_ptr + F + n, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def load_weighted(x_ptr, norm_ptr, n, mask, F, NORM: tl.constexpr, ACT: tl.constexpr):
    """x[n] and x[n] * norm_weight[n]."""
    x = load_input(x_ptr, n, mask, F, ACT)
    if NORM:
        return x, x * tl.load(norm_ptr + n, mask=mask, other=0.0)
    return x, x


@triton.jit
def scales_of(
    x_ptr, norm_ptr, K, T, F, eps, LIMIT: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, BLOCK_T: tl.constexpr
):
    """The factor that makes codes of x * norm_weight, the scale that makes numbers of codes, and sum(x**2)."""
    t = tl.arange(0, BLOCK_T)
    squares = tl.zeros([BLOCK_T], tl.float32)
    largest = tl.zeros([BLOCK_T], tl.float32)
    for i in tl.static_range(16):
        n = i * T + t
        x, weighted = load_weighted(x_ptr, norm_ptr, n, (t < T) & (n < K), F, NORM, ACT)
        squares += x * x
        largest = tl.maximum(largest, tl.abs(weighted))
    total = tl.sum(squares, 0)
    rms = 1.0
    if NORM:
        rms = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(total, K * 1.0) + eps))
    amax = tl.maximum(rms * tl.max(largest, 0), SCALE_MIN)
    return rms * tl.div_rn(LIMIT * 1.0, amax), tl.div_rn(amax, LIMIT * 1.0), rms


@triton.jit
def code_word(
    x_ptr,
    norm_ptr,
    K,
    T,
    F,
    factor,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    PLANE: tl.constexpr,
    START: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Words of one plane from START on, int32 (BLOCK_T,), and the sum of their codes for each lane."""
    t = START + tl.arange(0, BLOCK_T)
    word = tl.zeros([BLOCK_T], tl.int32)
    sums = tl.zeros([BLOCK_T], tl.int32)
    for b in tl.static_range(4):
        n = (4 * PLANE + b) * T + t
        _, weighted = load_weighted(x_ptr, norm_ptr, n, (t < T) & (n < K), F, NORM, ACT)
        bits = (weighted * factor + MAGIC).to(tl.int32, bitcast=True)
        word |= (bits & 255) << (8 * b)
        sums += (bits << 24) >> 24
    return word, sums


@triton.jit
def code_words_16(x_ptr, norm_ptr, K, T, factor, NORM: tl.constexpr, PLANE: tl.constexpr, BLOCK_T: tl.constexpr):
    """The words of one plane for codes of 16 bits: high bytes and low bytes, each int32 (BLOCK_T,)."""
    t = tl.arange(0, BLOCK_T)
    high = tl.zeros([BLOCK_T], tl.int32)
    low = tl.zeros([BLOCK_T], tl.int32)
    for b in tl.static_range(4):
        n = (4 * PLANE + b) * T + t
        _, weighted = load_weighted(x_ptr, norm_ptr, n, (t < T) & (n < K), 0, NORM, "")
        bits = (weighted * factor + MAGIC).to(tl.int32, bitcast=True)
        high |= (((bits + 128) >> 8) & 255) << (8 * b)
        low |= (bits & 255) << (8 * b)
    return high, low


@triton.jit
def quantize(
    words_ptr, scale_ptr, sum_ptr, x_ptr, norm_ptr, stride_x, eps,
    K: tl.constexpr, T: tl.constexpr, F: tl.constexpr, LIMIT: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Round tokens to 8 bits; one program for a token.

    Args:
        words_ptr: int32 (M, 4 T), out.
        scale_ptr, sum_ptr: float32 and int32 (M,), out: what a code stands for, and the sum of a token's codes.
        x_ptr: float32 (M, stride_x).
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(0).to(tl.int64)
    x_ptr += m * stride_x
    t = tl.arange(0, BLOCK_T)
    factor, scale, _ = scales_of(x_ptr, norm_ptr, K, T, F, eps, LIMIT, NORM, ACT, BLOCK_T)
    total = tl.zeros([BLOCK_T], tl.int32)
    for c in tl.static_range(4):
        word, sums = code_word(x_ptr, norm_ptr, K, T, F, factor, NORM, ACT, c, 0, BLOCK_T)
        tl.store(words_ptr + (m * 4 + c) * T + t, word, mask=t < T)
        total += sums
    tl.store(scale_ptr + m, scale)
    tl.store(sum_ptr + m, tl.sum(total, 0))


@triton.jit
def quantize_16(
    words_ptr, scale_ptr, length_ptr, x_ptr, norm_ptr, rows, eps,
    K: tl.constexpr, T: tl.constexpr, NORM: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Round tokens to 16 bits for the output head; one program for a token.

    Args:
        words_ptr: int32 (2 * rows, 4 T), out: high bytes in row m, low bytes in row rows + m.
        scale_ptr, length_ptr: float32 (M,), out: what a code stands for, and the length of the normalised token.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(0).to(tl.int64)
    x_ptr += m * K
    t = tl.arange(0, BLOCK_T)
    factor, scale, rms = scales_of(x_ptr, norm_ptr, K, T, 0, eps, 32512, NORM, "", BLOCK_T)
    squares = tl.zeros([BLOCK_T], tl.float32)
    for c in tl.static_range(4):
        high, low = code_words_16(x_ptr, norm_ptr, K, T, factor, NORM, c, BLOCK_T)
        tl.store(words_ptr + (m * 4 + c) * T + t, high, mask=t < T)
        tl.store(words_ptr + ((rows + m) * 4 + c) * T + t, low, mask=t < T)
        for b in tl.static_range(4):
            n = (4 * c + b) * T + t
            _, weighted = load_weighted(x_ptr, norm_ptr, n, (t < T) & (n < K), 0, NORM, "")
            squares += weighted * weighted
    tl.store(scale_ptr + m, scale)
    tl.store(length_ptr + m, rms * tl.sqrt(tl.sum(squares, 0)))
