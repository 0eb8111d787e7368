"""The backward pass of norm_round.py: from the gradient of the product's input to that of x and of the norm's weight.

Rounding passes the gradient on unchanged (straight-through). With n = h * rstd * weight and g the gradient of n::

    grad_h = rstd * (g * weight - h * rstd * mean(g * weight * h * rstd))
    grad_weight = sum over rows of g * h * rstd

This module has the case h = x. Where h is made of a gate, gated_backward.py goes on to the gate and up.

A program works on many rows and adds up its part of the weight's gradient in registers. A second kernel sums the parts
(`column_sums`), always in the same order. The loop over rows loads the next row while it computes one (STAGES).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_lit.quant.kernels.triton.launch import column_blocks, multiprocessors, on_device_of, operator, power_of_2


@triton.jit
def _norm_block(grad_ptr, x_ptr, rows, columns, inside, I, rstd, weight):
    """Load a block. Return grad * normed (its sum over rows is the weight's gradient), grad * weight, and normed."""
    at = rows[:, None] * I.to(tl.int64) + columns[None, :]
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normed = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
    return grad * normed, grad * weight, normed


@triton.jit
def _norm_backward(
    grad_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    parts_ptr,
    M,
    I,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MORE_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + columns).to(tl.float32)[None, :]
    part = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if MORE_COLUMNS > 0:
        more_columns = COLUMNS + tl.arange(0, MORE_COLUMNS)
        more_weight = tl.load(weight_ptr + more_columns, mask=more_columns < I, other=0.0).to(tl.float32)[None, :]
        more_part = tl.zeros((ROWS, MORE_COLUMNS), dtype=tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        row_inside = (rows < M)[:, None]
        inside = row_inside & (columns >= 0)[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        product, grad, normed = _norm_block(grad_ptr, x_ptr, rows, columns, inside, I, rstd, weight)
        part += product
        total = tl.sum(grad * normed, axis=1)
        if MORE_COLUMNS > 0:
            more_inside = row_inside & (more_columns < I)[None, :]
            product, more_grad, more_normed = _norm_block(
                grad_ptr, x_ptr, rows, more_columns, more_inside, I, rstd, more_weight
            )
            more_part += product
            total += tl.sum(more_grad * more_normed, axis=1)
        mean = (total / I)[:, None]
        at = grad_x_ptr + rows[:, None] * I.to(tl.int64)
        grad_x = rstd * (grad - normed * mean)
        tl.store(at + columns[None, :], grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if MORE_COLUMNS > 0:
            more_x = rstd * (more_grad - more_normed * mean)
            tl.store(at + more_columns[None, :], more_x.to(grad_x_ptr.dtype.element_ty), mask=more_inside)
    parts = parts_ptr + tl.program_id(0) * I
    tl.store(parts + columns, tl.sum(part, axis=0))
    if MORE_COLUMNS > 0:
        tl.store(parts + more_columns, tl.sum(more_part, axis=0), mask=more_columns < I)


@triton.jit
def _column_sums(parts_ptr, sums_ptr, M, I, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, M, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (columns < I)[None, :]
        total += tl.load(parts_ptr + rows[:, None] * I + columns[None, :], mask=inside, other=0.0)
    tl.store(sums_ptr + columns, tl.sum(total, axis=0).to(sums_ptr.dtype.element_ty), mask=columns < I)


def column_sums(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums over rows of float32 (M, I), as (I,) of `dtype`.

    `parts.sum(0)` starts few programs, because there are few columns. Here each has 32 bytes of a row: 8 columns.
    """
    rows, columns = parts.shape
    sums = parts.new_empty((columns,), dtype=dtype)
    with on_device_of(parts):
        _column_sums[(triton.cdiv(columns, 8),)](parts, sums, rows, columns, ROWS=512, COLUMNS=8, num_warps=8)
    return sums


def _norm_backward_fake(grad: Tensor, x: Tensor, norm_weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(norm_weight)


@operator(_norm_backward_fake)
def norm_backward(grad: Tensor, x: Tensor, norm_weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the norm's weight.

    The gradient of x has the dtype of `grad`. It is added to the gradient of the residual stream, and that sum stays
    float32. Rounding what one branch adds to it, as its product was rounded, halves the bytes of the result.

    Args:
        grad: float (M, I), contiguous: the gradient of the normed x.
        x: float (M, I), contiguous.
        norm_weight: (I,).
        rstd: float32 (M,), from `norm_round`.

    Returns:
        (M, I) in the dtype of `grad`, and (I,) in the dtype of the weight.
    """
    rows, inputs = x.shape
    tile_rows, num_warps = power_of_2(1024 / inputs), 8 if inputs >= 2048 else 4 if inputs >= 512 else 1
    first, rest = column_blocks(inputs)
    programs = min(triton.cdiv(rows, tile_rows), min(16, 32 // num_warps) * multiprocessors(x.device))  # as measured
    grad_x = torch.empty_like(grad)
    parts = x.new_empty((programs, inputs), dtype=torch.float32)
    with on_device_of(x):
        _norm_backward[(programs,)](
            grad,
            x,
            norm_weight,
            rstd,
            grad_x,
            parts,
            rows,
            inputs,
            ROWS=tile_rows,
            COLUMNS=first,
            MORE_COLUMNS=rest,
            STAGES=2,
            num_warps=num_warps,
        )
    return grad_x, column_sums(parts, norm_weight.dtype)
