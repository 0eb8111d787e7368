"""Output gradients rounded to FP8, for the gradient of a product's input.

::

    grad_x = (grad_y * weight_scale) @ weight_codes

The codes -1, 0 and +1 are exact in FP8 (e4m3: 4 exponent bits, 3 mantissa bits). Each row of grad_y * weight_scale is
divided by a scale that maps its largest magnitude to 448, the largest number of e4m3, and rounded: a relative error of
at most 1/16 for each element, which averages out in the sum over a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_lit.quant.kernels.triton.launch import on_device_of, operator, power_of_2

FP8 = torch.float8_e4m3fn
LARGEST = tl.constexpr(448.0)


@triton.jit
def round_row(values, largest):
    """Return float32 `values` in FP8 and the scale of their row, whose largest magnitude is `largest`."""
    largest = tl.maximum(largest, 1e-30)  # a row of zeros must not divide by zero
    return (values * (LARGEST / largest)).to(tl.float8e4nv), largest / LARGEST


@triton.jit
def _fp8_rows(grad_ptr, column_scale_ptr, fp8_ptr, scale_ptr, M, N, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    grad = tl.load(grad_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    column_scale = tl.load(column_scale_ptr + columns, mask=columns < N, other=0.0)
    grad = grad.to(tl.float32) * column_scale[None, :]
    fp8, scale = round_row(grad, tl.max(tl.abs(grad), axis=1)[:, None])
    tl.store(fp8_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], fp8, mask=inside)
    tl.store(scale_ptr + rows[:, None], scale, mask=(rows < M)[:, None])


def _fp8_rows_fake(grad: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = grad.shape
    return grad.new_empty((rows, columns), dtype=FP8), grad.new_empty((rows, 1), dtype=torch.float32)


@operator(_fp8_rows_fake)
def fp8_rows(grad: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply the columns by their scales, and round each row to FP8.

    Args:
        grad: float (M, N); the elements of a row are contiguous.
        column_scale: float32 (N,).

    Returns:
        fp8: float8_e4m3fn (M, N).
        scale: float32 (M, 1); grad * column_scale ~= fp8 * scale.
    """
    rows, columns = grad.shape
    fp8 = grad.new_empty((rows, columns), dtype=FP8)
    scale = grad.new_empty((rows, 1), dtype=torch.float32)
    tile_rows, tile_columns = power_of_2(4096 / columns), triton.next_power_of_2(columns)
    with on_device_of(grad):
        _fp8_rows[(triton.cdiv(rows, tile_rows),)](
            grad,
            column_scale,
            fp8,
            scale,
            rows,
            columns,
            grad.stride(0),
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            num_warps=4 if tile_columns <= 4096 else 8,
        )
    return fp8, scale
