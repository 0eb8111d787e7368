"""Weights rounded to codes, for all matrices that one product multiplies by.

The matrices of q, k and v, or of gate and up, stand one below the other in the result: their rows are the outputs of
one product. The result holds the codes twice, in one pass over the latent weights:

- int8 (O, I), for the forward product;
- FP8 (I, O), for the gradient of the input: `torch._scaled_mm` needs the summed axis to be the contiguous one.

The scales are computed first. The mean of the magnitudes is the rule's but for the order of the sum, which is the same
in every call. Other scales are computed by the rule itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_lit.quant.activations import SCALE_MIN
from bitnet_lit.quant.kernels.triton.fp8_rows import FP8
from bitnet_lit.quant.kernels.triton.launch import on_device_of, operator
from bitnet_lit.quant.weights import AbsMean, AbsMedian, PerRow, Sign, WeightRule

SMALLEST = tl.constexpr(SCALE_MIN)
RULES: dict[str, WeightRule] = {
    "absmean": AbsMean(),
    "absmean_row": AbsMean(PerRow()),
    "absmedian": AbsMedian(),
    "absmedian_row": AbsMedian(PerRow()),
    "sign": Sign(),
}
"""The rules that the kernels support, by a name that a custom operator can have as its argument."""


@triton.jit
def _sums(weight_ptr, sums_ptr, numel, BLOCK: tl.constexpr):
    """Write each program's part of the sum of the magnitudes, and of the sum of the weights."""
    parts = tl.num_programs(0)
    at = tl.arange(0, BLOCK)
    magnitude, plain = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(tl.program_id(0) * BLOCK, numel, parts * BLOCK):
        weight = tl.load(weight_ptr + first + at, mask=first + at < numel, other=0.0).to(tl.float32)
        magnitude += tl.abs(weight)
        plain += weight
    tl.store(sums_ptr + tl.program_id(0), tl.sum(magnitude))
    tl.store(sums_ptr + parts + tl.program_id(0), tl.sum(plain))


@triton.jit
def _round_weight(
    weight_ptr,
    sums_ptr,
    row_scale_ptr,
    codes_ptr,
    transposed_ptr,
    scale_ptr,
    O,
    I,
    transposed_stride,
    count,
    parts,
    IS_SIGN: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = (rows < O)[:, None] & (columns < I)[None, :]
    at = rows.to(tl.int64)[:, None] * I + columns[None, :]
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SUMS:
        part = tl.arange(0, PARTS)
        total = tl.sum(tl.load(sums_ptr + part, mask=part < parts, other=0.0))
        # In this order NaN stays NaN, so a run that diverged is seen as one.
        mean = tl.div_rn(total, count)
        scale = tl.where(mean < SMALLEST, SMALLEST, mean) + tl.zeros((BLOCK_O,), dtype=tl.float32)
    elif PER_ROW:
        scale = tl.load(row_scale_ptr + rows, mask=rows < O, other=1.0)
    else:
        scale = tl.load(row_scale_ptr) + tl.zeros((BLOCK_O,), dtype=tl.float32)
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + rows, scale, mask=rows < O)
    if IS_SIGN:
        center = tl.div_rn(tl.sum(tl.load(sums_ptr + parts + part, mask=part < parts, other=0.0)), count)
        codes = tl.where(weight >= center, 1.0, -1.0)
    else:
        # Rounded half to even and clamped to -1..1, as the reference does: 0.5 and -0.5 become 0.
        scaled = weight * tl.div_rn(1.0, scale)[:, None]
        codes = tl.where(scaled > 0.5, 1.0, tl.where(scaled < -0.5, -1.0, 0.0))
    tl.store(codes_ptr + at, codes.to(tl.int8), mask=inside)
    if HAS_TRANSPOSED:
        at = columns.to(tl.int64)[:, None] * transposed_stride + rows[None, :]
        tl.store(transposed_ptr + at, tl.trans(codes).to(tl.float8e4nv), mask=(columns < I)[:, None] & (rows < O)[None])


def _round_one(weight: Tensor, rule: str, codes: Tensor, transposed: Tensor | None, scale: Tensor) -> None:
    """Round one matrix into its rows of `codes` and `scale`, and its columns of `transposed`."""
    (rows, inputs), has_sums = weight.shape, rule in ("absmean", "sign")
    # Each program sums two blocks or more, and each program of the second kernel adds up all these sums.
    parts = min(1024, triton.cdiv(weight.numel(), 2 * 2048))
    sums = weight.new_empty((2, parts), dtype=torch.float32) if has_sums else None
    row_scale = None if has_sums else RULES[rule].scale(weight)
    with on_device_of(weight):
        if has_sums:
            _sums[(parts,)](weight, sums, weight.numel(), BLOCK=2048, num_warps=4)
        _round_weight[(triton.cdiv(rows, 128), triton.cdiv(inputs, 64))](
            weight,
            sums,
            row_scale,
            codes,
            transposed,
            scale,
            rows,
            inputs,
            0 if transposed is None else transposed.stride(0),
            float(weight.numel()),
            parts,
            IS_SIGN=rule == "sign",
            HAS_SUMS=has_sums,
            PER_ROW=row_scale is not None and row_scale.numel() > 1,
            HAS_TRANSPOSED=transposed is not None,
            PARTS=triton.next_power_of_2(parts),
            BLOCK_O=128,
            BLOCK_I=64,
            num_warps=8,
        )


def round_into(weights: Sequence[Tensor], rule: str, codes: Tensor, transposed: Tensor | None, scale: Tensor) -> None:
    """Round the matrices of one product, and write what `round_weights` returns into tensors that are there already."""
    first = 0
    for weight in weights:
        own = slice(first, first + weight.shape[0])
        _round_one(weight, rule, codes[own], None if transposed is None else transposed[:, own], scale[own])
        first = own.stop


def _round_weights_fake(weights: Sequence[Tensor], rule: str, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, inputs = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    return (
        weights[0].new_empty((rows, inputs), dtype=torch.int8),
        weights[0].new_empty((inputs, rows) if transposed else (0, 0), dtype=FP8),
        weights[0].new_empty((rows,), dtype=torch.float32),
    )


@operator(_round_weights_fake)
def round_weights(weights: Sequence[Tensor], rule: str, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Round the matrices of one product.

    Args:
        weights: each float (O, I), contiguous; O and I are multiples of 16, and I is the same for all.
        rule: a key of `RULES`.
        transposed: whether the gradient of the input is computed in FP8.

    Returns:
        codes: int8 (sum of O, I).
        transposed: float8_e4m3fn (I, sum of O); empty unless asked for.
        scale: float32 (sum of O,), one for each output.
    """
    rows, inputs = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    codes = weights[0].new_empty((rows, inputs), dtype=torch.int8)
    fp8 = weights[0].new_empty((inputs, rows) if transposed else (0, 0), dtype=FP8)
    scale = weights[0].new_empty((rows,), dtype=torch.float32)
    round_into(weights, rule, codes, fp8 if transposed else None, scale)
    return codes, fp8, scale
