"""The gradient of the weights, a product over all tokens.

::

    grad_weight = grad_y.T @ (x_codes * x_scale)

It is a product in the dtype of grad_y, whose result is stored in the dtype of the weights at once. With
`quant.grad=fp8_all` it is a product in FP8::

    grad_weight = (grad_y * x_scale).T @ x_codes

FP8 products need the summed axis, here the tokens, to be the contiguous one. So both operands are transposed while they
are rounded. grad_y * x_scale has one scale for the matrix. Codes keep four significant bits: 127 becomes 128. So each
element has an error of at most 1/16, beside that of the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_lit.quant.kernels.triton.fp8_rows import FP8, LARGEST
from bitnet_lit.quant.kernels.triton.launch import on_device_of, operator


@triton.jit
def _fp8_transposed(
    values_ptr,
    row_scale_ptr,
    scale_ptr,
    fp8_ptr,
    M,
    N,
    stride,
    HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    values = tl.load(values_ptr + at, mask=inside, other=0).to(tl.float32)
    if HAS_SCALE:
        factor = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0) / tl.load(scale_ptr)
        # The scale is computed from maxima that were rounded, so a value may lie a little above the largest number.
        values = tl.clamp(values * factor[:, None], -LARGEST, LARGEST)
    at = columns.to(tl.int64)[:, None] * M + rows[None, :]
    tl.store(fp8_ptr + at, tl.trans(values.to(tl.float8e4nv)), mask=(columns < N)[:, None] & (rows < M)[None, :])


def fp8_transposed(values: Tensor, row_scale: Tensor | None, scale: Tensor | None) -> Tensor:
    """Return values * row_scale / scale, rounded to FP8 and transposed.

    Args:
        values: float or int8 (M, N); the elements of a row are contiguous.
        row_scale: float32 (M, 1), or None for 1.
        scale: float32 (), or None for 1. No magnitude of values * row_scale / scale is above 448.

    Returns:
        float8_e4m3fn (N, M).
    """
    rows, columns = values.shape
    fp8 = values.new_empty((columns, rows), dtype=FP8)
    with on_device_of(values):
        _fp8_transposed[(triton.cdiv(rows, 128), triton.cdiv(columns, 64))](
            values,
            row_scale,
            scale,
            fp8,
            rows,
            columns,
            values.stride(0),
            HAS_SCALE=row_scale is not None,
            BLOCK_M=128,
            BLOCK_N=64,
            num_warps=8,
        )
    return fp8


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
    grad: Tensor, row_scale: Tensor, scale: Tensor, x_codes: Tensor, x_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty((grad.shape[1], x_codes.shape[1]), dtype=dtype)


@operator(_weight_gradient_fp8_fake)
def weight_gradient_fp8(
    grad: Tensor, row_scale: Tensor, scale: Tensor, x_codes: Tensor, x_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return grad.T @ (x_codes * x_scale), computed in FP8.

    Args:
        grad: float (M, O); M and O are multiples of 16.
        row_scale, scale: float32 (M, 1) and (O,). No magnitude of grad * scale / row_scale is above 448, as `fp8_rows`
            returns it.
        x_codes: int8 (M, I); I is a multiple of 16.
        x_scale: float32 (M, 1).
        dtype: of the result.
    """
    whole = (row_scale * x_scale).amax() / scale.amin()
    return torch._scaled_mm(
        fp8_transposed(grad, x_scale, whole),
        fp8_transposed(x_codes, None, None).t(),
        scale_a=whole,
        scale_b=torch.ones_like(whole),
        out_dtype=dtype,
        use_fast_accum=True,
    )
