"""The output head: int8 rows times a token of 16 bits, and exact logits for tokens that could be the likeliest.

Rounding the rows of the head moves a logit by a random error. With x the normalised token and s the scale of a row, its
standard deviation is s |x| / sqrt(12): an error of a code is uniform in one step. `bounds` and `refine` compute every
logit again that could be the largest but for six standard deviations, from the head's own float rows. So greedy
decoding is that of a float head. Of 128,000 tokens these are mostly one or two.
"""

import triton
import triton.language as tl

from bitnet_lit.inference.engines.cuda.kernels.rounding import load_weighted
from bitnet_lit.inference.engines.cuda.kernels.words import dot4

SIX_DEVIATIONS: tl.constexpr = tl.constexpr(6 / 12**0.5)


@triton.jit
def head_matvec(
    logits_ptr, x_ptr, x_scale_ptr, codes_ptr, scale_ptr,
    V: tl.constexpr, T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The logits of one token.

    Args:
        logits_ptr: float32 (V,), out.
        x_ptr: int32 (2, 4 T), as `rounding.quantize_16` leaves them.
        codes_ptr: int32 (V, 4 T): bytes in the order of the planes.
    """
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    t = tl.arange(0, BLOCK_T)
    at = codes_ptr + v[:, None].to(tl.int64) * (4 * T) + t[None, :]
    inside = (v < V)[:, None] & (t < 4 * T)[None, :]
    w = tl.load(at, mask=inside, other=0)
    w_scale = tl.load(scale_ptr + v, mask=v < V, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    high_total = tl.zeros([BLOCK_V, BLOCK_T], tl.int32)
    low_total = tl.zeros([BLOCK_V, BLOCK_T], tl.int32)
    for t0 in tl.static_range(0, 4 * T, BLOCK_T):
        if t0 > 0:
            w = tl.load(at + t0, mask=(v < V)[:, None] & (t0 + t < 4 * T)[None, :], other=0)
        high = tl.load(x_ptr + t0 + t, mask=t0 + t < 4 * T, other=0)
        low = tl.load(x_ptr + 4 * T + t0 + t, mask=t0 + t < 4 * T, other=0)
        high_total = dot4(w, tl.broadcast_to(high[None, :], (BLOCK_V, BLOCK_T)), high_total)
        low_total = dot4(w, tl.broadcast_to(low[None, :], (BLOCK_V, BLOCK_T)), low_total)
    product = tl.sum(high_total, 1).to(tl.float32) * 256.0 + tl.sum(low_total, 1).to(tl.float32)
    tl.store(logits_ptr + v, product * (tl.load(x_scale_ptr) * w_scale), mask=v < V)


@triton.jit(do_not_specialize=["M", "rows"])
def head_matmul(
    logits_ptr, x_ptr, x_scale_ptr, codes_ptr, scale_ptr, M, rows,
    V: tl.constexpr, KB: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The logits of several tokens.

    Args:
        logits_ptr: float32 (M, V), out.
        x_ptr: int8 (2 * rows, KB), as `rounding.quantize_16` leaves them.
        codes_ptr: int8 (V, KB).
    """
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    w_at = codes_ptr + tl.where(v < V, v, 0)[:, None].to(tl.int64) * KB + k[None, :]
    high_at = x_ptr + tl.where(m < M, m, 0)[None, :] * KB + k[:, None]
    low_at = high_at + rows * KB
    high = tl.zeros([BLOCK_V, BLOCK_M], tl.int32)
    low = tl.zeros([BLOCK_V, BLOCK_M], tl.int32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for k0 in range(0, KB, BLOCK_K):
        w = tl.load(w_at + k0)
        high = tl.dot(w, tl.load(high_at + k0), high, out_dtype=tl.int32)
        low = tl.dot(w, tl.load(low_at + k0), low, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
    w_scale = tl.load(scale_ptr + v, mask=v < V, other=0.0)
    logits = (high.to(tl.float32) * 256.0 + low.to(tl.float32)) * (x_scale[None, :] * w_scale[:, None])
    tl.store(logits_ptr + m[None, :].to(tl.int64) * V + v[:, None], logits, mask=(v < V)[:, None] & (m < M)[None, :])


@triton.jit
def bounds(
    bound_ptr, logits_ptr, length_ptr, scale_ptr,
    V: tl.constexpr, PIECES: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store a lower bound of the largest logit of each block, among the first PIECES: float32 (M, BLOCKS)."""
    m, block = tl.program_id(1), tl.program_id(0)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    scale = tl.load(scale_ptr + v, mask=v < V, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    logits = tl.load(logits_ptr + m.to(tl.int64) * V + v, mask=v < PIECES, other=float("-inf"))
    lower = logits - scale * (SIX_DEVIATIONS * tl.load(length_ptr + m))
    tl.store(bound_ptr + m * BLOCKS + block, tl.max(lower, 0))


@triton.jit
def refine(
    logits_ptr, bound_ptr, length_ptr, scale_ptr, x_ptr, norm_ptr, rows_ptr, eps,
    V: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, BLOCKS: tl.constexpr, ROUND_BLOCKS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute the logits again, from the head's own rows, that could be the largest.

    Args:
        logits_ptr: float32 (M, V), changed.
        bound_ptr: as `bounds` leaves it.
        x_ptr, norm_ptr: float32 (M, K), the tokens, and the weight of their norm.
        rows_ptr: the head (V, K) as it is stored.
    """
    m, block = tl.program_id(1), tl.program_id(0)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    scale = tl.load(scale_ptr + v, mask=v < V, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    all_blocks = tl.arange(0, ROUND_BLOCKS)
    bound = tl.max(tl.load(bound_ptr + m * BLOCKS + all_blocks, mask=all_blocks < BLOCKS, other=float("-inf")), 0)
    logits = tl.load(logits_ptr + m.to(tl.int64) * V + v, mask=v < V, other=float("-inf"))
    likely = (logits + scale * (SIX_DEVIATIONS * tl.load(length_ptr + m)) >= bound).to(tl.int32)
    count = tl.sum(likely, 0)
    if count > 0:
        k = tl.arange(0, BLOCK_K)
        x, weighted = load_weighted(x_ptr + m.to(tl.int64) * K, norm_ptr, k, k < K, 0, NORM, "")
        if NORM:
            weighted *= tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x, 0), K * 1.0) + eps))
        i = tl.arange(0, BLOCK_V)
        while count > 0:
            found = tl.argmax(likely, 0)
            token = block * BLOCK_V + found
            row = tl.load(rows_ptr + token.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
            tl.store(logits_ptr + m.to(tl.int64) * V + token, tl.sum(row * weighted, 0))
            likely = tl.where(i == found, 0, likely)
            count -= 1
