"""The rotary embedding of queries and keys, in the joint output of their product, and its backward pass.

A row of the joint output holds the heads of a token: queries, then keys, then values. Queries and keys are rotated in
place, and attention reads all three as views::

    first, second = the two halves of a head
    rotated = first * cos - second * sin, second * cos + first * sin

The backward pass collects the gradients of the three into rows again, rotated back. It writes them rounded to FP8 for
the gradient of the input (fp8_rows.py), and in their own dtype for the gradient of the weights where that is no FP8
product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_lit.quant.kernels.triton.fp8_rows import FP8, round_row
from bitnet_lit.quant.kernels.triton.launch import on_device_of, operator


@triton.jit
def _rotate(y_ptr, cos_ptr, sin_ptr, T, stride, heads, HALF: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    head, column = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    inside = (head < heads)[:, None] & (column < HALF)[None, :]
    angles = (row % T) * (2 * HALF) + column
    first_cos = tl.load(cos_ptr + angles, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    first_sin = tl.load(sin_ptr + angles, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    second_cos = tl.load(cos_ptr + angles + HALF, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    second_sin = tl.load(sin_ptr + angles + HALF, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + row.to(tl.int64) * stride + head[:, None] * (2 * HALF) + column[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (first * first_cos - second * first_sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (second * second_cos + first * second_sin).to(y_ptr.dtype.element_ty), mask=inside)


def rotate_rows(y: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Rotate the first `heads` heads of each row, in place.

    Args:
        y: float (M, O), contiguous; row m is the token at position m modulo T.
        cos, sin: (T, head_dim), contiguous.
    """
    half = cos.shape[1] // 2
    with on_device_of(y):
        _rotate[(y.shape[0],)](
            y,
            cos,
            sin,
            cos.shape[0],
            y.shape[1],
            heads,
            HALF=half,
            HEADS=triton.next_power_of_2(heads),
            COLUMNS=triton.next_power_of_2(half),
            num_warps=4 if heads * half >= 512 else 1,
        )


@triton.jit
def _halves(grad_ptr, batch, position, batch_stride, position_stride, head_stride, head, column, inside, HALF):
    """Load both halves of the heads of a token from a gradient (B, T, heads, head_dim), as float32."""
    at = grad_ptr + batch.to(tl.int64) * batch_stride + position.to(tl.int64) * position_stride
    at += head[:, None] * head_stride + column[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _largest(first, second):
    return tl.max(tl.maximum(tl.abs(first), tl.abs(second)))


@triton.jit
def _rotary_backward(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    out_scale_ptr,
    grad_ptr,
    fp8_ptr,
    fp8_scale_ptr,
    T,
    q_batch,
    q_position,
    q_head,
    k_batch,
    k_position,
    k_head,
    v_batch,
    v_position,
    v_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_FP8: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    batch, position = row // T, row % T
    head, kv_head, column = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_KV), tl.arange(0, COLUMNS)
    inside = (head < HEADS)[:, None] & (column < HALF)[None, :]
    kv_inside = (kv_head < KV_HEADS)[:, None] & (column < HALF)[None, :]
    angles = position * (2 * HALF) + column
    first_cos = tl.load(cos_ptr + angles, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    first_sin = tl.load(sin_ptr + angles, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    second_cos = tl.load(cos_ptr + angles + HALF, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    second_sin = tl.load(sin_ptr + angles + HALF, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    dtype = grad_ptr.dtype.element_ty
    first, second = _halves(q_ptr, batch, position, q_batch, q_position, q_head, head, column, inside, HALF)
    q_first = (first * first_cos + second * second_sin).to(dtype)
    q_second = (second * second_cos - first * first_sin).to(dtype)
    first, second = _halves(k_ptr, batch, position, k_batch, k_position, k_head, kv_head, column, kv_inside, HALF)
    k_first = (first * first_cos + second * second_sin).to(dtype)
    k_second = (second * second_cos - first * first_sin).to(dtype)
    first, second = _halves(v_ptr, batch, position, v_batch, v_position, v_head, kv_head, column, kv_inside, HALF)
    v_first, v_second = first.to(dtype), second.to(dtype)

    q_at = head[:, None] * (2 * HALF) + column[None, :]
    k_at = (HEADS + kv_head)[:, None] * (2 * HALF) + column[None, :]
    v_at = (HEADS + KV_HEADS + kv_head)[:, None] * (2 * HALF) + column[None, :]
    start = row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * 2 * HALF)
    if HAS_GRAD:
        tl.store(grad_ptr + start + q_at, q_first, mask=inside)
        tl.store(grad_ptr + start + q_at + HALF, q_second, mask=inside)
        tl.store(grad_ptr + start + k_at, k_first, mask=kv_inside)
        tl.store(grad_ptr + start + k_at + HALF, k_second, mask=kv_inside)
        tl.store(grad_ptr + start + v_at, v_first, mask=kv_inside)
        tl.store(grad_ptr + start + v_at + HALF, v_second, mask=kv_inside)
    if HAS_FP8:
        q_1 = q_first.to(tl.float32) * tl.load(out_scale_ptr + q_at, mask=inside, other=0.0)
        q_2 = q_second.to(tl.float32) * tl.load(out_scale_ptr + q_at + HALF, mask=inside, other=0.0)
        k_1 = k_first.to(tl.float32) * tl.load(out_scale_ptr + k_at, mask=kv_inside, other=0.0)
        k_2 = k_second.to(tl.float32) * tl.load(out_scale_ptr + k_at + HALF, mask=kv_inside, other=0.0)
        v_1 = v_first.to(tl.float32) * tl.load(out_scale_ptr + v_at, mask=kv_inside, other=0.0)
        v_2 = v_second.to(tl.float32) * tl.load(out_scale_ptr + v_at + HALF, mask=kv_inside, other=0.0)
        largest = tl.maximum(tl.maximum(_largest(q_1, q_2), _largest(k_1, k_2)), _largest(v_1, v_2))
        q_1, scale = round_row(q_1, largest)
        tl.store(fp8_ptr + start + q_at, q_1, mask=inside)
        tl.store(fp8_ptr + start + q_at + HALF, round_row(q_2, largest)[0], mask=inside)
        tl.store(fp8_ptr + start + k_at, round_row(k_1, largest)[0], mask=kv_inside)
        tl.store(fp8_ptr + start + k_at + HALF, round_row(k_2, largest)[0], mask=kv_inside)
        tl.store(fp8_ptr + start + v_at, round_row(v_1, largest)[0], mask=kv_inside)
        tl.store(fp8_ptr + start + v_at + HALF, round_row(v_2, largest)[0], mask=kv_inside)
        tl.store(fp8_scale_ptr + row, scale)


def _rotary_backward_fake(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, out_scale: Tensor | None, has_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, heads, size), kv_heads = grad_q.shape, grad_k.shape[2]
    rows, columns = batch * length, (heads + 2 * kv_heads) * size
    rounded = rows if out_scale is not None else 0
    return (
        grad_q.new_empty((rows if has_grad else 0, columns)),
        grad_q.new_empty((rounded, columns), dtype=FP8),
        grad_q.new_empty((rounded, 1), dtype=torch.float32),
    )


@operator(_rotary_backward_fake)
def rotary_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, out_scale: Tensor | None, has_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the joint output before its rotation, and the same rounded to FP8.

    Args:
        grad_q: float (B, T, heads, head_dim).
        grad_k, grad_v: float (B, T, kv_heads, head_dim).
        cos, sin: (T, head_dim), contiguous.
        out_scale: float32 (O,), by which columns are multiplied before they are rounded to FP8; None to round nothing.
        has_grad: whether the gradient is returned in its own dtype too.

    Returns:
        grad: (B * T, O) in the dtype of `grad_q`; empty unless `has_grad`.
        fp8: float8_e4m3fn (B * T, O); empty without `out_scale`.
        fp8_scale: float32 (B * T, 1); empty without `out_scale`. grad * out_scale ~= fp8 * fp8_scale.
    """
    (batch, length, heads, size), kv_heads = grad_q.shape, grad_k.shape[2]
    grads = [grad if grad.stride(3) == 1 else grad.contiguous() for grad in (grad_q, grad_k, grad_v)]
    rows, columns = batch * length, (heads + 2 * kv_heads) * size
    rounded = rows if out_scale is not None else 0
    grad = grad_q.new_empty((rows if has_grad else 0, columns))
    fp8 = grad_q.new_empty((rounded, columns), dtype=FP8)
    fp8_scale = grad_q.new_empty((rounded, 1), dtype=torch.float32)
    with on_device_of(grad_q):
        _rotary_backward[(rows,)](
            *grads,
            cos,
            sin,
            out_scale,
            grad,
            fp8,
            fp8_scale,
            length,
            *(grad.stride(axis) for grad in grads for axis in (0, 1, 2)),
            HEADS=heads,
            KV_HEADS=kv_heads,
            HALF=size // 2,
            HAS_GRAD=has_grad,
            HAS_FP8=out_scale is not None,
            BLOCK_HEADS=triton.next_power_of_2(heads),
            BLOCK_KV=triton.next_power_of_2(kv_heads),
            COLUMNS=triton.next_power_of_2(size // 2),
            num_warps=4 if columns >= 2048 else 2,
        )
    return grad, fp8, fp8_scale
