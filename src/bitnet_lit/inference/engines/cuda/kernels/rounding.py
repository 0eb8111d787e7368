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

from bitnet_lit.inference.engines.cuda.kernels.words import dot4, pack4

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
def load_norm(norm_ptr, K, T, START, NORM: tl.constexpr, BLOCK_T: tl.constexpr):
    """The weights of a norm for 16 stretches of words from START on: 16 times float32 (BLOCK_T,)."""
    t = START + tl.arange(0, BLOCK_T)
    weights = ()
    if NORM:
        for i in tl.static_range(16):
            n = i * T + t
            weights += (tl.load(norm_ptr + n, mask=(t < T) & (n < K), other=0.0),)
    return weights


@triton.jit
def load_token(x_ptr, weights, K, T, START, NORM: tl.constexpr, BLOCK_T: tl.constexpr):
    """A token times the weights of its norm, 16 times float32 (BLOCK_T,), and sums of squares and maxima of it."""
    t = START + tl.arange(0, BLOCK_T)
    values = ()
    squares = tl.zeros([BLOCK_T], tl.float32)
    largest = tl.zeros([BLOCK_T], tl.float32)
    for i in tl.static_range(16):
        n = i * T + t
        x = tl.load(x_ptr + n, mask=(t < T) & (n < K), other=0.0)
        squares += x * x
        if NORM:
            x *= weights[i]
        largest = tl.maximum(largest, tl.abs(x))
        values += (x,)
    return values, squares, largest


@triton.jit
def _sum_and_max(sum_a, max_a, sum_b, max_b):
    return sum_a + sum_b, tl.maximum(max_a, max_b)


@triton.jit
def reduce_token(squares, largest):
    """The sum and the maximum of all lanes."""
    return tl.reduce((squares, largest), 0, _sum_and_max)


@triton.jit
def scales_of(squares, largest, K, eps, LIMIT: tl.constexpr, NORM: tl.constexpr):
    """The factor that makes codes of x * norm_weight, the scale that makes numbers of codes, and the norm's factor.

    Args:
        squares: the sum of x**2.
        largest: of abs(x * norm_weight).
    """
    rms = 1.0
    if NORM:
        rms = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, K * 1.0) + eps))
    amax = tl.maximum(rms * largest, SCALE_MIN)
    return rms * tl.div_rn(LIMIT * 1.0, amax), tl.div_rn(amax, LIMIT * 1.0), rms


@triton.jit
def _rounded(x, factor):
    """Round to integers, in the low bits."""
    return (x * factor + MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def code_word(values, factor, PLANE: tl.constexpr):
    """The words of one plane, int32, of what `load_token` returns."""
    return pack4(
        _rounded(values[4 * PLANE], factor),
        _rounded(values[4 * PLANE + 1], factor),
        _rounded(values[4 * PLANE + 2], factor),
        _rounded(values[4 * PLANE + 3], factor),
    )


@triton.jit
def code_words_16(values, factor, PLANE: tl.constexpr):
    """The words of one plane for codes of 16 bits: high bytes and low bytes."""
    a, b = _rounded(values[4 * PLANE], factor), _rounded(values[4 * PLANE + 1], factor)
    c, d = _rounded(values[4 * PLANE + 2], factor), _rounded(values[4 * PLANE + 3], factor)
    return pack4((a + 128) >> 8, (b + 128) >> 8, (c + 128) >> 8, (d + 128) >> 8), pack4(a, b, c, d)


@triton.jit
def quantize(
    words_ptr, scale_ptr, sum_ptr, x_ptr, norm_ptr, eps,
    K: tl.constexpr, T: tl.constexpr, LIMIT: tl.constexpr, NORM: tl.constexpr, BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Round tokens to 8 bits; one program for a token.

    Args:
        words_ptr: int32 (M, 4 T), out.
        scale_ptr, sum_ptr: float32 and int32 (M,), out: what a code stands for, and the sum of a token's codes.
        x_ptr: float32 (M, K).
    """
    weights = load_norm(norm_ptr, K, T, 0, NORM, BLOCK_T)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    values, squares, largest = load_token(x_ptr + m * K, weights, K, T, 0, NORM, BLOCK_T)
    squares, largest = reduce_token(squares, largest)
    factor, scale, _ = scales_of(squares, largest, K, eps, LIMIT, NORM)
    total = tl.zeros([BLOCK_T], tl.int32)
    for c in tl.static_range(4):
        word = code_word(values, factor, c)
        tl.store(words_ptr + (m * 4 + c) * T + t, word, mask=t < T)
        total = dot4(word, tl.full([BLOCK_T], 0x01010101, tl.int32), total)
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
    weights = load_norm(norm_ptr, K, T, 0, NORM, BLOCK_T)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    values, squares, largest = load_token(x_ptr + m * K, weights, K, T, 0, NORM, BLOCK_T)
    squares, largest = reduce_token(squares, largest)
    factor, scale, rms = scales_of(squares, largest, K, eps, 32512, NORM)
    weighted = tl.zeros([BLOCK_T], tl.float32)
    for i in tl.static_range(16):
        weighted += values[i] * values[i]
    for c in tl.static_range(4):
        high, low = code_words_16(values, factor, c)
        tl.store(words_ptr + (m * 4 + c) * T + t, high, mask=t < T)
        tl.store(words_ptr + ((rows + m) * 4 + c) * T + t, low, mask=t < T)
    tl.store(scale_ptr + m, scale)
    tl.store(length_ptr + m, rms * tl.sqrt(tl.sum(weighted, 0)))
