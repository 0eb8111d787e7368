"""2-bit weights times 8-bit tokens.

The weights are words of 16 codes (`..layout`): the bits 2c of byte b hold code + 1. `word >> 2c & 0x03030303` is four
codes + 1 as bytes, in the order of the bytes of plane c of a token. Their products are added up as integers, which is
exact in any order, and the sum of the token's codes is subtracted once: sum((code + 1) x) - sum(x) = sum(code x).

`matvec` reads each weight once for one token, and multiplies four bytes in one instruction (dp4a). It computes the norm
and the rounding of the token itself, in every program: that is a few thousand numbers from the second-level cache, and
one launch less. `matmul` takes tokens that `rounding.quantize` has rounded, and multiplies on the tensor cores.
"""

import triton
import triton.language as tl

from bitnet_lit.inference.engines.cuda.kernels.rounding import (
    activation,
    code_word,
    load_norm,
    load_token,
    reduce_token,
    scales_of,
)
from bitnet_lit.inference.engines.cuda.kernels.words import dot4, dot16, prefetch, unpack


@triton.jit
def _product(w, w2, values, factor, ACT: tl.constexpr):
    """The products of words (BLOCK_N, BLOCK_T) with a token, for both halves of a gated layer; int32 (BLOCK_N,)."""
    x0, x1 = code_word(values, factor, 0), code_word(values, factor, 1)
    x2, x3 = code_word(values, factor, 2), code_word(values, factor, 3)
    minus = tl.full(x0.shape, -1, tl.int32)  # -1 in each byte: the sum of the codes goes off
    less = dot4(x0, minus, dot4(x1, minus, dot4(x2, minus, dot4(x3, minus, tl.zeros(x0.shape, tl.int32)))))
    # Words are made once, and go to the lanes that multiply through shared memory. Without `gather`, Triton would have
    # each warp make all of them.
    i = tl.arange(0, x0.shape[0])
    x0, x1, x2, x3 = tl.gather(x0, i, 0), tl.gather(x1, i, 0), tl.gather(x2, i, 0), tl.gather(x3, i, 0)
    less = tl.gather(less, i, 0)
    x0 = tl.broadcast_to(x0[None, :], w.shape)
    x1 = tl.broadcast_to(x1[None, :], w.shape)
    x2 = tl.broadcast_to(x2[None, :], w.shape)
    x3 = tl.broadcast_to(x3[None, :], w.shape)
    less = tl.broadcast_to(less[None, :], w.shape)
    product = tl.sum(dot16(w, x0, x1, x2, x3, less), 1)
    if ACT != "":
        return product, tl.sum(dot16(w2, x0, x1, x2, x3, less), 1)
    return product, product


@triton.jit
def matvec(
    y_ptr, x_ptr, norm_ptr, codes_ptr, scale_ptr, bias_ptr, eps,
    N: tl.constexpr, K: tl.constexpr, T: tl.constexpr, LIMIT: tl.constexpr, NORM: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = W quantize(norm(x)) for one token.

    Args:
        y_ptr: float32 (N,), out. With RESIDUAL, the product is added to it.
        x_ptr: float32 (K,).
        codes_ptr: int32 (N, T); with ACT (2 N, T), and y = act(W[:N] x) * (W[N:] x).
        scale_ptr: float32, one for each row of codes.
        BLOCK_A, BLOCK_B: words of a row that are multiplied at once: the first part of it, and the rest where there is
            one. Both are powers of two, as blocks are; one block for all words would be half empty for many sizes.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_A)
    at = codes_ptr + n[:, None] * T + t[None, :]
    inside = (n < N)[:, None] & (t < T)[None, :]
    # Before the wait: neither weights nor norms depend on the kernel before.
    w = tl.load(at, mask=inside, other=0)
    w2 = tl.load(at + N * T, mask=inside, other=0) if ACT != "" else w
    weights = load_norm(norm_ptr, K, T, 0, NORM, BLOCK_A)
    if BLOCK_B > 0:
        t = BLOCK_A + tl.arange(0, BLOCK_B)
        at = codes_ptr + n[:, None] * T + t[None, :]
        inside = (n < N)[:, None] & (t < T)[None, :]
        rest = tl.load(at, mask=inside, other=0)
        rest2 = tl.load(at + N * T, mask=inside, other=0) if ACT != "" else rest
        weights_b = load_norm(norm_ptr, K, T, BLOCK_A, NORM, BLOCK_B)
    w_scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    w_scale2 = tl.load(scale_ptr + N + n, mask=n < N, other=0.0) if ACT != "" else w_scale
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    values, squares, largest = load_token(x_ptr, weights, K, T, 0, NORM, BLOCK_A)
    if BLOCK_B > 0:
        values_b, squares_b, largest_b = load_token(x_ptr, weights_b, K, T, BLOCK_A, NORM, BLOCK_B)
        squares_b, largest_b = reduce_token(squares_b, largest_b)
    squares, largest = reduce_token(squares, largest)
    if BLOCK_B > 0:
        squares += squares_b
        largest = tl.maximum(largest, largest_b)
    factor, scale, _ = scales_of(squares, largest, K, eps, LIMIT, NORM)
    product, product2 = _product(w, w2, values, factor, ACT)
    if BLOCK_B > 0:
        more, more2 = _product(rest, rest2, values_b, factor, ACT)
        product += more
        product2 += more2
    y = product.to(tl.float32) * (scale * w_scale)
    if ACT != "":
        y2 = product2.to(tl.float32) * (scale * w_scale2)
        y = activation(y, ACT) * y2
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)
    if RESIDUAL:
        y += tl.load(y_ptr + n, mask=n < N, other=0.0)
    tl.store(y_ptr + n, y, mask=n < N)


@triton.jit
def _scaled(total, x_scale_ptr, x_sum_ptr, scale_ptr, bias_ptr, n, m, M, N, BIAS: tl.constexpr):
    """Return the float32 outputs of sums of products of codes, (outputs, tokens)."""
    total -= tl.load(x_sum_ptr + m, mask=m < M, other=0)[None, :]
    x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
    w_scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    y = total.to(tl.float32) * (x_scale[None, :] * w_scale[:, None])
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[:, None]
    return y


@triton.jit
def _store(
    y_ptr, total, total2, x_scale_ptr, x_sum_ptr, scale_ptr, bias_ptr, n, m, M, N,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Apply the scales, and what comes behind a product, to sums of products (outputs, tokens); store them."""
    y = _scaled(total, x_scale_ptr, x_sum_ptr, scale_ptr, bias_ptr, n, m, M, N, BIAS)
    if ACT != "":
        y2 = _scaled(total2, x_scale_ptr, x_sum_ptr, scale_ptr + N, bias_ptr, n, m, M, N, False)
        y = activation(y, ACT) * y2
    inside = (n < N)[:, None] & (m < M)[None, :]
    y_at = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    if RESIDUAL:
        y += tl.load(y_at, mask=inside, other=0.0)
    tl.store(y_at, y, mask=inside)


@triton.jit(do_not_specialize=["M"])
def matmul(
    y_ptr, x_ptr, x_scale_ptr, x_sum_ptr, codes_ptr, scale_ptr, bias_ptr, partial_ptr, counter_ptr, M,
    N: tl.constexpr, K4: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = x W^T for several rounded tokens.

    With SPLITS the inputs are divided among programs, so that a matrix of few outputs occupies the whole GPU. Each
    leaves its sums, and the last one to finish adds them up: integers, so the order does not matter.

    Args:
        y_ptr: float32 (M, N), out. With RESIDUAL, the product is added to it.
        x_ptr: int8 (M, 4 K4), in the order of the planes.
        x_scale_ptr, x_sum_ptr: of the tokens, as `quantize` leaves them.
        codes_ptr: int8 (N, K4): four codes in each byte. K4 is a multiple of BLOCK_J. With ACT (2 N, K4), and
            y = act(W[:N] x) * (W[N:] x): a program reads a token once for both halves.
        partial_ptr: int32, a tile for each program and half, for what programs leave to each other.
        counter_ptr: int32, one for each block of outputs, zeros before and after; with SPLITS, tokens are one block.
    """
    block, split = tl.program_id(0), tl.program_id(2)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_J)
    PART: tl.constexpr = triton.cdiv(K4 // BLOCK_J, SPLITS) * BLOCK_J
    # Rows beyond the end read row 0 again: their products are not stored.
    w_at = codes_ptr + tl.where(n < N, n, 0)[:, None].to(tl.int64) * K4 + j[None, :]
    x_at = x_ptr + tl.where(m < M, m, 0)[None, :].to(tl.int64) * (4 * K4) + j[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    total2 = total
    if PDL:
        line = tl.arange(0, triton.next_power_of_2(triton.cdiv(PART, 128)))[None, :] * 128
        row = codes_ptr + tl.where(n < N, n, 0)[:, None].to(tl.int64) * K4
        prefetch(row + tl.minimum(split * PART + line, K4 - 1))
        if ACT != "":
            prefetch(row + N * K4 + tl.minimum(split * PART + line, K4 - 1))
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for j0 in range(split * PART, min(K4, (split + 1) * PART), BLOCK_J):
        w = tl.load(w_at + j0)
        x0, x1 = tl.load(x_at + j0), tl.load(x_at + K4 + j0)
        x2, x3 = tl.load(x_at + 2 * K4 + j0), tl.load(x_at + 3 * K4 + j0)
        total = tl.dot(unpack(w, 0), x0, total, out_dtype=tl.int32)
        total = tl.dot(unpack(w, 1), x1, total, out_dtype=tl.int32)
        total = tl.dot(unpack(w, 2), x2, total, out_dtype=tl.int32)
        total = tl.dot(unpack(w, 3), x3, total, out_dtype=tl.int32)
        if ACT != "":
            w2 = tl.load(w_at + N * K4 + j0)
            total2 = tl.dot(unpack(w2, 0), x0, total2, out_dtype=tl.int32)
            total2 = tl.dot(unpack(w2, 1), x1, total2, out_dtype=tl.int32)
            total2 = tl.dot(unpack(w2, 2), x2, total2, out_dtype=tl.int32)
            total2 = tl.dot(unpack(w2, 3), x3, total2, out_dtype=tl.int32)
    if SPLITS == 1:
        _store(
            y_ptr, total, total2, x_scale_ptr, x_sum_ptr, scale_ptr, bias_ptr, n, m, M, N, BIAS, RESIDUAL, ACT
        )  # fmt: skip
    else:
        TILE: tl.constexpr = BLOCK_N * BLOCK_M
        HALVES: tl.constexpr = 2 if ACT != "" else 1
        tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        here = partial_ptr + block * (SPLITS * HALVES * TILE) + tile
        tl.store(here + split * (HALVES * TILE), total)
        if ACT != "":
            tl.store(here + split * (HALVES * TILE) + TILE, total2)
        tl.debug_barrier()  # every lane's sums are written before the program counts itself
        done = tl.atomic_add(counter_ptr + block, 1, sem="acq_rel", scope="gpu")
        if done == SPLITS - 1:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            total2 = total
            for i in tl.static_range(SPLITS):
                total += tl.load(here + i * (HALVES * TILE), cache_modifier=".cg")
                if ACT != "":
                    total2 += tl.load(here + i * (HALVES * TILE) + TILE, cache_modifier=".cg")
            _store(
                y_ptr, total, total2, x_scale_ptr, x_sum_ptr, scale_ptr, bias_ptr, n, m, M, N, BIAS, RESIDUAL, ACT
            )  # fmt: skip
            tl.store(counter_ptr + block, 0)
