"""One pass over the activations before a quantized product: gate, norm, and rounding to int8 codes.

::

    h = x, or activation(gate) * up where x holds gate and up side by side
    n = h / sqrt(mean(h**2) + eps) * weight, or h where there is no norm
    codes, scale = AbsMax(bits).quantize(n)

Each value is rounded to the dtype of x where the reference rounds it: after the activation, the product with `up`, and
the norm. So the codes equal the reference's but for the last bits of the norm's sum. The backward pass is in
norm_backward.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_lit.quant.activations import SCALE_MIN
from bitnet_lit.quant.kernels.triton.launch import column_blocks, on_device_of, operator, power_of_2

SMALLEST = tl.constexpr(SCALE_MIN)
HALF_EVEN = tl.constexpr(1.5 * 2**23)
"""Adding and subtracting it rounds a float32 of magnitude below 2**22 to an integer, ties to even."""


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """Return the activation function of float32 `gate`."""
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate))
    else:
        positive = tl.maximum(gate, 0.0)
        return positive * positive


@triton.jit
def _input(x_ptr, rows, columns, inside, I, ACTIVATION: tl.constexpr):
    """Load h as float32: x, or the product of the gate and up."""
    dtype = x_ptr.dtype.element_ty
    if ACTIVATION == "":
        h = tl.load(x_ptr + rows.to(tl.int64)[:, None] * I + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        gates = x_ptr + rows.to(tl.int64)[:, None] * (2 * I) + columns[None, :]
        gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gates + I, mask=inside, other=0.0).to(tl.float32)
        h = (activated(gate, ACTIVATION).to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)
    return h


@triton.jit
def _normed(h, rstd, weight_ptr, columns, I, dtype):
    weight = tl.load(weight_ptr + columns, mask=columns < I, other=0.0).to(tl.float32)
    return (h * rstd[:, None] * weight[None, :]).to(dtype).to(tl.float32)


@triton.jit
def _codes(h, factor, LIMIT: tl.constexpr):
    return tl.clamp((h * factor[:, None] + HALF_EVEN) - HALF_EVEN, -LIMIT - 1.0, LIMIT + 0.0).to(tl.int8)


@triton.jit
def _norm_round(
    x_ptr,
    weight_ptr,
    codes_ptr,
    scale_ptr,
    rstd_ptr,
    M,
    I,
    eps,
    LIMIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MORE_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = rows < M
    dtype = x_ptr.dtype.element_ty
    columns = tl.arange(0, COLUMNS)
    inside = row_inside[:, None] & (columns >= 0)[None, :]
    h = _input(x_ptr, rows, columns, inside, I, ACTIVATION)
    squares = tl.sum(h * h, axis=1)
    if MORE_COLUMNS > 0:
        more_columns = COLUMNS + tl.arange(0, MORE_COLUMNS)
        more_inside = row_inside[:, None] & (more_columns < I)[None, :]
        more = _input(x_ptr, rows, more_columns, more_inside, I, ACTIVATION)
        squares += tl.sum(more * more, axis=1)
    if HAS_NORM:
        rstd = 1.0 / tl.sqrt(squares / I + eps)
        tl.store(rstd_ptr + rows, rstd, mask=row_inside)
        h = _normed(h, rstd, weight_ptr, columns, I, dtype)
        if MORE_COLUMNS > 0:
            more = _normed(more, rstd, weight_ptr, more_columns, I, dtype)
    largest = tl.max(tl.abs(h), axis=1)
    if MORE_COLUMNS > 0:
        largest = tl.maximum(largest, tl.max(tl.abs(more), axis=1))
    largest = tl.maximum(largest, SMALLEST)
    factor = tl.div_rn(1.0, largest) * LIMIT  # PyTorch, too, divides a number by a tensor in these two steps
    at = codes_ptr + rows.to(tl.int64)[:, None] * I
    tl.store(at + columns[None, :], _codes(h, factor, LIMIT), mask=inside)
    if MORE_COLUMNS > 0:
        tl.store(at + more_columns[None, :], _codes(more, factor, LIMIT), mask=more_inside)
    # A maximum passes over NaN, and int8 cannot hold it. The sum of squares carries it, and inf, into the scale.
    tl.store(scale_ptr + rows, tl.div_rn(largest, LIMIT + 0.0) + 0.0 * squares, mask=row_inside)


def _norm_round_fake(
    x: Tensor, norm_weight: Tensor | None, eps: float, activation: str, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, inputs = x.shape[0], x.shape[1] // (2 if activation else 1)
    return (
        x.new_empty((rows, inputs), dtype=torch.int8),
        x.new_empty((rows, 1), dtype=torch.float32),
        x.new_empty((0 if norm_weight is None else rows,), dtype=torch.float32),
    )


@operator(_norm_round_fake)
def norm_round(
    x: Tensor, norm_weight: Tensor | None, eps: float, activation: str, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round activations, after the norm and the gate before it.

    Args:
        x: float (M, I), contiguous; with an activation (M, 2 * I): gate, then up.
        norm_weight: (I,), or None for no norm.
        activation: "silu", "relu2", or "" for none.
        bits: of a code, 2 to 8.

    Returns:
        codes: int8 (M, I).
        scale: float32 (M, 1).
        rstd: float32 (M,), which the backward pass needs; empty where there is no norm.
    """
    rows, inputs = x.shape[0], x.shape[1] // (2 if activation else 1)
    codes = x.new_empty((rows, inputs), dtype=torch.int8)
    scale = x.new_empty((rows, 1), dtype=torch.float32)
    rstd = x.new_empty((0 if norm_weight is None else rows,), dtype=torch.float32)
    # A warp works on about a thousand elements, as measured on an H200.
    tile_rows = power_of_2(1152 / inputs) if inputs < 512 else min(4, power_of_2(6144 / inputs))
    first, rest = column_blocks(inputs)
    with on_device_of(x):
        _norm_round[(triton.cdiv(rows, tile_rows),)](
            x,
            norm_weight,
            codes,
            scale,
            rstd,
            rows,
            inputs,
            eps,
            LIMIT=2 ** (bits - 1) - 1,
            ACTIVATION=activation,
            HAS_NORM=norm_weight is not None,
            ROWS=tile_rows,
            COLUMNS=first,
            MORE_COLUMNS=rest,
            num_warps=min(8, power_of_2(tile_rows * inputs / 704)),
            enable_fp_fusion=False,  # a fused multiply-add would round a code only once, and some ties differently
        )
    return codes, scale, rstd
