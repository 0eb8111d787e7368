"""The gradient of the weights, a product over all tokens.

::

    grad_weight = grad_y.T @ (x_codes * x_scale)

It is a product in the dtype of grad_y, whose result is stored in the dtype of the weights at once. With
`quant.grad=fp8_all` it is a product in FP8 of what there is already for the gradient of the input: row m of
grad_y * weight_scale in FP8, and its scale r[m] (fp8_rows.py). A scale of a row cannot be taken out of a sum over rows.
So it goes to the other operand::

    grad_weight = fp8.T @ round(x_codes * x_scale * r / whole) * whole / weight_scale

where `whole` is one number, which maps the largest possible element to 448. So output gradients are rounded once for
both products. The other operand keeps four significant bits: an error of at most 1/16 for each element.

FP8 products need the summed axis, here the tokens, to be the contiguous one. So both operands are transposed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_lit.quant.kernels.triton.fp8_rows import FP8
from bitnet_lit.quant.kernels.triton.launch import on_device_of, operator


@triton.jit
def _transposed(
    values_ptr,
    row_scale_ptr,
    result_ptr,
    M,
    N,
    HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    values = tl.load(values_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], mask=inside, other=0)
    if HAS_SCALE:
        row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
        values = (values.to(tl.float32) * row_scale[:, None]).to(tl.float8e4nv)
    at = columns.to(tl.int64)[:, None] * M + rows[None, :]
    tl.store(result_ptr + at, tl.trans(values), mask=(columns < N)[:, None] & (rows < M)[None, :])


def transposed(values: Tensor, row_scale: Tensor | None) -> Tensor:
    """Return values * row_scale in FP8, transposed.

    Args:
        values: int8 (M, N), or without `row_scale` float8_e4m3fn (M, N); contiguous.
        row_scale: float32 (M, 1). No magnitude of values * row_scale is above 448.

    Returns:
        float8_e4m3fn (N, M).
    """
    rows, columns = values.shape
    result = values.new_empty((columns, rows), dtype=FP8)
    with on_device_of(values):
        _transposed[(triton.cdiv(rows, 128), triton.cdiv(columns, 64))](
            values if row_scale is not None else values.view(torch.int8),  # bytes are moved as they are
            row_scale,
            result if row_scale is not None else result.view(torch.int8),
            rows,
            columns,
            HAS_SCALE=row_scale is not None,
            BLOCK_M=128,
            BLOCK_N=64,
            num_warps=8,
        )
    return result


def _weight_gradient_fake(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty((grad.shape[1], x.shape[1]), dtype=dtype)


@operator(_weight_gradient_fake)
def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad.T @ x.

    Args:
        grad: float (M, O).
        x: (M, I), in the dtype of `grad`.
        dtype: of the result.
    """
    if grad.dtype == dtype or not grad.is_cuda:
        return (grad.t() @ x).to(dtype)
    return torch.mm(grad.t(), x, out_dtype=dtype)


def _weight_gradient_fp8_fake(
    fp8: Tensor,
    x_codes: Tensor,
    row_scale: Tensor,
    whole: Tensor,
    inverse: Tensor,
    rows: list[int],
    per_row: bool,
    dtype: torch.dtype,
) -> Tensor:
    return x_codes.new_empty((fp8.shape[1], x_codes.shape[1]), dtype=dtype)


@operator(_weight_gradient_fp8_fake)
def weight_gradient_fp8(
    fp8: Tensor,
    x_codes: Tensor,
    row_scale: Tensor,
    whole: Tensor,
    inverse: Tensor,
    rows: list[int],
    per_row: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return (fp8 * whole * inverse).T @ (x_codes * row_scale), computed in FP8.

    Args:
        fp8: float8_e4m3fn (M, O); M and O are multiples of 16.
        x_codes: int8 (M, I); I is a multiple of 16.
        row_scale: float32 (M, 1). No magnitude of x_codes * row_scale is above 448.
        whole: float32 ().
        inverse: float32 (O,).
        rows: the rows of each matrix in the result, whose sum is O.
        per_row: whether `inverse` differs within a matrix.
        dtype: of the result.
    """
    result = x_codes.new_empty((fp8.shape[1], x_codes.shape[1]), dtype=dtype)
    grad, x = transposed(fp8, None), transposed(x_codes, row_scale).t()
    start = 0
    for count in [sum(rows)] if per_row else rows:
        torch._scaled_mm(
            grad[start : start + count],
            x,
            scale_a=whole,
            scale_b=torch.ones_like(whole) if per_row else inverse[start],
            out_dtype=dtype,
            use_fast_accum=False,  # its sums lose bits at each of many thousand tokens
            out=result[start : start + count],
        )
        start += count
    return result.mul_(inverse[:, None]) if per_row else result
