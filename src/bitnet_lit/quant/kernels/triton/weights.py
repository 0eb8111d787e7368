"""Weights rounded to codes, for all matrices that one product multiplies by.

The matrices of q, k and v, or of gate and up, stand one below the other in the result: their rows are the outputs of
one product. The result holds the codes twice, in one pass over the latent weights:

- int8 (O, I), for the forward product;
- FP8 (I, O), for the gradient of the input: `torch._scaled_mm` needs the summed axis to be the contiguous one.

The scales are computed first. The mean of the magnitudes is the rule's but for the order of the sum, which is the same
in every call. Other scales are computed by the rule itself, and so are the codes of the rules in `BY_RULE`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_lit.quant.activations import SCALE_MIN
from bitnet_lit.quant.kernels.rounded_by_rule import round_by_rule
from bitnet_lit.quant.kernels.triton.fp8_rows import FP8
from bitnet_lit.quant.kernels.triton.launch import on_device_of, operator
from bitnet_lit.quant.three_of_four import ThreeOfFour
from bitnet_lit.quant.weights import AbsMean, AbsMedian, PerRow, Sign, WeightRule

CONTIGUOUS = torch.contiguous_format
SMALLEST = tl.constexpr(SCALE_MIN)
RULES: dict[str, WeightRule] = {
    "absmean": AbsMean(),
    "absmean_row": AbsMean(PerRow()),
    "absmedian": AbsMedian(),
    "absmedian_row": AbsMedian(PerRow()),
    "sign": Sign(),
    "three_of_four": ThreeOfFour(),
}
"""The rules that the kernels support, by a name that a custom operator can have as its argument."""
BY_RULE = ("three_of_four",)
"""Rules whose codes are computed by the rule itself, in a few more passes over the weights."""


@triton.jit
def _chosen(index, first, second, third):
    """Return one of three tensors, which all start at multiples of 16 bytes."""
    chosen = first
    if index == 1:
        chosen = second
    if index == 2:
        chosen = third
    return tl.multiple_of(chosen, 16)


@triton.jit
def _sums(
    first_ptr, second_ptr, third_ptr, sums_ptr, first_rows, second_rows, third_rows, I, parts, BLOCK: tl.constexpr
):
    """Write each program's part of the sum of a matrix's magnitudes, and of the sum of its weights."""
    index = tl.program_id(1)
    weight_ptr = _chosen(index, first_ptr, second_ptr, third_ptr)
    rows = tl.where(index == 0, first_rows, tl.where(index == 1, second_rows, third_rows))
    at = tl.arange(0, BLOCK)
    magnitude, plain = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(tl.program_id(0) * BLOCK, rows * I, parts * BLOCK):
        weight = tl.load(weight_ptr + first + at, mask=first + at < rows * I, other=0.0).to(tl.float32)
        magnitude += tl.abs(weight)
        plain += weight
    sums_ptr += index * 2 * parts + tl.program_id(0)
    tl.store(sums_ptr, tl.sum(magnitude))
    tl.store(sums_ptr + parts, tl.sum(plain))


@triton.jit
def _round_weight(
    first_ptr,
    second_ptr,
    third_ptr,
    sums_ptr,
    row_scale_ptr,
    codes_ptr,
    transposed_ptr,
    scale_ptr,
    first_rows,
    second_rows,
    third_rows,
    I,
    transposed_stride,
    parts,
    IS_SIGN: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    index = tl.program_id(2)
    weight_ptr = _chosen(index, first_ptr, second_ptr, third_ptr)
    O = tl.where(index == 0, first_rows, tl.where(index == 1, second_rows, third_rows))
    start = tl.where(index == 0, 0, tl.where(index == 1, first_rows, first_rows + second_rows))
    start = tl.multiple_of(start, 16)  # all are numbers of rows, which are multiples of 16
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = (rows < O)[:, None] & (columns < I)[None, :]
    at = rows.to(tl.int64)[:, None] * I + columns[None, :]
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SUMS:
        part = tl.arange(0, PARTS)
        sums_ptr += index * 2 * parts
        count = O.to(tl.float32) * I
        total = tl.sum(tl.load(sums_ptr + part, mask=part < parts, other=0.0))
        # In this order NaN stays NaN, so a run that diverged is seen as one.
        mean = tl.div_rn(total, count)
        scale = tl.where(mean < SMALLEST, SMALLEST, mean) + tl.zeros((BLOCK_O,), dtype=tl.float32)
    else:
        scale = tl.load(row_scale_ptr + start + rows, mask=rows < O, other=1.0)
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + start + rows, scale, mask=rows < O)
    if IS_SIGN:
        center = tl.div_rn(tl.sum(tl.load(sums_ptr + parts + part, mask=part < parts, other=0.0)), count)
        codes = tl.where(weight >= center, 1.0, -1.0)
    else:
        # Rounded half to even and clamped to -1..1, as the reference does: 0.5 and -0.5 become 0.
        scaled = weight * tl.div_rn(1.0, scale)[:, None]
        codes = tl.where(scaled > 0.5, 1.0, tl.where(scaled < -0.5, -1.0, 0.0))
    tl.store(codes_ptr + start.to(tl.int64) * I + at, codes.to(tl.int8), mask=inside)
    if HAS_TRANSPOSED:
        at = columns.to(tl.int64)[:, None] * transposed_stride + start + rows[None, :]
        tl.store(transposed_ptr + at, tl.trans(codes).to(tl.float8e4nv), mask=(columns < I)[:, None] & (rows < O)[None])


def round_into(weights: Sequence[Tensor], rule: str, codes: Tensor, transposed: Tensor | None, scale: Tensor) -> None:
    """Round the matrices of one product, and write what `round_weights` returns into tensors that are there already."""
    if rule in BY_RULE:
        return round_by_rule(weights, RULES[rule], codes, transposed, scale)
    assert len(weights) <= 3, "a launch rounds up to three matrices"
    # The kernels read whole rows of 16-byte blocks. A parameter that is a view of other memory may lie otherwise.
    weights = [
        w if w.is_contiguous() and w.data_ptr() % 16 == 0 else w.clone(memory_format=CONTIGUOUS) for w in weights
    ]
    inputs, rows = weights[0].shape[1], [weight.shape[0] for weight in weights]
    three = [*weights, weights[0], weights[0]][:3]
    three_rows = [*rows, 0, 0][:3]
    has_sums = rule in ("absmean", "sign")
    # Each program sums two blocks or more, and each program of the second kernel adds up all these sums.
    parts = min(1024, triton.cdiv(max(rows) * inputs, 2 * 2048))
    sums = scale.new_empty((len(weights), 2, parts)) if has_sums else None
    row_scale = None
    if not has_sums:
        scales = [RULES[rule].scale(weight) for weight in weights]
        row_scale = torch.cat([s.reshape(-1).expand(count) for s, count in zip(scales, rows, strict=True)])
    with on_device_of(codes):
        if has_sums:
            _sums[(parts, len(weights))](*three, sums, *three_rows, inputs, parts, BLOCK=2048, num_warps=4)
        _round_weight[(triton.cdiv(max(rows), 128), triton.cdiv(inputs, 64), len(weights))](
            *three,
            sums,
            row_scale,
            codes,
            transposed,
            scale,
            *three_rows,
            inputs,
            codes.shape[0],
            parts,
            IS_SIGN=rule == "sign",
            HAS_SUMS=has_sums,
            HAS_TRANSPOSED=transposed is not None,
            PARTS=triton.next_power_of_2(parts),
            BLOCK_O=128,
            BLOCK_I=64,
            num_warps=8,
        )


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
        weights: each float (O, I); O and I are multiples of 16, and I is the same for all. Three at most.
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
