"""The backward pass of norm_round.py where it has a gate: down to the gradients of the gate and of up.

With h = activation(gate) * up, and the gradient of h as in norm_backward.py::

    grad_up = grad_h * activation(gate),  grad_gate = grad_h * up * activation'(gate)

Gate and up are the output of one quantized product. Its backward pass needs their gradient rounded to FP8 for the
gradient of the input (fp8_rows.py), and in its own dtype for the gradient of the weights where that is no FP8 product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_lit.quant.kernels.triton.fp8_rows import FP8, round_row
from bitnet_lit.quant.kernels.triton.launch import (
    column_blocks,
    multiprocessors,
    on_device_of,
    operator,
    power_of_2,
)
from bitnet_lit.quant.kernels.triton.norm_backward import column_sums


@triton.jit
def _gate_block(grad_ptr, x_ptr, row, columns, inside, I, ACTIVATION: tl.constexpr):
    """Load a block of a row. Return grad, the activated gate, up, and the derivative of the activation."""
    dtype = x_ptr.dtype.element_ty
    gates = x_ptr + row * (2 * I.to(tl.int64)) + columns
    grad = tl.load(grad_ptr + row * I.to(tl.int64) + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + I, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        active = gate * sigmoid
        slope = sigmoid + active * (1.0 - sigmoid)
    else:
        positive = tl.maximum(gate, 0.0)
        active = positive * positive
        slope = 2.0 * positive
    return grad, active.to(dtype).to(tl.float32), up, slope


@triton.jit
def _through_norm(grad, active, up, weight, rstd, dtype):
    """Return grad * normed, whose sum over rows is the weight's gradient, and grad * weight and normed."""
    normed = (active * up).to(dtype).to(tl.float32) * rstd
    return grad * normed, grad * weight, normed


@triton.jit
def _store_gate_block(grad_x_ptr, row, columns, inside, I, grad, active, up, slope, HAS_GRAD: tl.constexpr):
    """Store the gradients of gate and up where they are wanted, and return them in their dtype, as float32."""
    dtype = grad_x_ptr.dtype.element_ty
    grad_gate, grad_up = (grad * up * slope).to(dtype), (grad * active).to(dtype)
    if HAS_GRAD:
        gates = grad_x_ptr + row * (2 * I.to(tl.int64)) + columns
        tl.store(gates, grad_gate, mask=inside)
        tl.store(gates + I, grad_up, mask=inside)
    return grad_gate.to(tl.float32), grad_up.to(tl.float32)


@triton.jit
def _out_scales(out_scale_ptr, columns, inside, I, PER_ROW: tl.constexpr):
    """Return the scales of the weights of gate and of up: numbers, or one for each column."""
    if PER_ROW:
        gate = tl.load(out_scale_ptr + columns, mask=inside, other=0.0)
        up = tl.load(out_scale_ptr + I + columns, mask=inside, other=0.0)
    else:
        gate, up = tl.load(out_scale_ptr), tl.load(out_scale_ptr + I)
    return gate, up


@triton.jit
def _gated_backward(
    grad_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    out_scale_ptr,
    grad_x_ptr,
    fp8_ptr,
    fp8_scale_ptr,
    parts_ptr,
    M,
    I,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_FP8: tl.constexpr,
    PER_ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    MORE_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    inside = columns >= 0
    dtype = x_ptr.dtype.element_ty
    if HAS_NORM:
        weight = tl.load(weight_ptr + columns).to(tl.float32)
        part = tl.zeros((COLUMNS,), dtype=tl.float32)
    if MORE_COLUMNS > 0:
        more_columns = COLUMNS + tl.arange(0, MORE_COLUMNS)
        more_inside = more_columns < I
        if HAS_NORM:
            more_weight = tl.load(weight_ptr + more_columns, mask=more_inside, other=0.0).to(tl.float32)
            more_part = tl.zeros((MORE_COLUMNS,), dtype=tl.float32)
    for row in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=STAGES):
        grad, active, up, slope = _gate_block(grad_ptr, x_ptr, row, columns, inside, I, ACTIVATION)
        if MORE_COLUMNS > 0:
            more_grad, more_active, more_up, more_slope = _gate_block(
                grad_ptr, x_ptr, row, more_columns, more_inside, I, ACTIVATION
            )
        if HAS_NORM:
            rstd = tl.load(rstd_ptr + row)
            product, grad, normed = _through_norm(grad, active, up, weight, rstd, dtype)
            part += product
            total = tl.sum(grad * normed)
            if MORE_COLUMNS > 0:
                product, more_grad, more_normed = _through_norm(
                    more_grad, more_active, more_up, more_weight, rstd, dtype
                )
                more_part += product
                total += tl.sum(more_grad * more_normed)
                more_grad = rstd * (more_grad - more_normed * (total / I))
            grad = rstd * (grad - normed * (total / I))
        grad_gate, grad_up = _store_gate_block(grad_x_ptr, row, columns, inside, I, grad, active, up, slope, HAS_GRAD)
        if MORE_COLUMNS > 0:
            more_gate, more_grad_up = _store_gate_block(
                grad_x_ptr, row, more_columns, more_inside, I, more_grad, more_active, more_up, more_slope, HAS_GRAD
            )
        if HAS_FP8:
            gate_scale, up_scale = _out_scales(out_scale_ptr, columns, inside, I, PER_ROW)
            grad_gate *= gate_scale
            grad_up *= up_scale
            largest = tl.max(tl.maximum(tl.abs(grad_gate), tl.abs(grad_up)))
            if MORE_COLUMNS > 0:
                gate_scale, up_scale = _out_scales(out_scale_ptr, more_columns, more_inside, I, PER_ROW)
                more_gate *= gate_scale
                more_grad_up *= up_scale
                largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(more_gate), tl.abs(more_grad_up))))
            gates = fp8_ptr + row * (2 * I.to(tl.int64))
            rounded, scale = round_row(grad_gate, largest)
            tl.store(gates + columns, rounded)
            tl.store(gates + I + columns, round_row(grad_up, largest)[0])
            if MORE_COLUMNS > 0:
                tl.store(gates + more_columns, round_row(more_gate, largest)[0], mask=more_inside)
                tl.store(gates + I + more_columns, round_row(more_grad_up, largest)[0], mask=more_inside)
            tl.store(fp8_scale_ptr + row, scale)
    if HAS_NORM:
        parts = parts_ptr + tl.program_id(0) * I
        tl.store(parts + columns, part)
        if MORE_COLUMNS > 0:
            tl.store(parts + more_columns, more_part, mask=more_inside)


def _gated_backward_fake(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    rstd: Tensor,
    activation: str,
    out_scale: Tensor | None,
    per_row: bool,
    has_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rounded = x.shape[0] if out_scale is not None else 0
    return (
        x.new_empty((x.shape[0] if has_grad else 0, x.shape[1])),
        x.new_empty((rounded, x.shape[1]), dtype=FP8),
        x.new_empty((rounded, 1), dtype=torch.float32),
        x.new_empty((0,)) if norm_weight is None else torch.empty_like(norm_weight),
    )


@operator(_gated_backward_fake)
def gated_backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    rstd: Tensor,
    activation: str,
    out_scale: Tensor | None,
    per_row: bool,
    has_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of gate and up, the same rounded to FP8 with one scale for each row, and that of the norm.

    Args:
        grad: float (M, I), contiguous: the gradient of the normed product of activation(gate) and up.
        x: float (M, 2 * I), contiguous: gate, then up.
        norm_weight: (I,), or None for no norm.
        rstd: float32 (M,), from `norm_round`; empty without a norm.
        activation: "silu" or "relu2".
        out_scale: float32 (2 * I,), by which columns are multiplied before they are rounded to FP8: the scales of the
            weights that made gate and up. None to round nothing.
        per_row: whether those scales differ within gate and within up.
        has_grad: whether the gradient is returned in its own dtype too.

    Returns:
        grad_x: (M, 2 * I) in the dtype of x; empty unless `has_grad`.
        fp8: float8_e4m3fn (M, 2 * I); empty without `out_scale`.
        fp8_scale: float32 (M, 1); empty without `out_scale`. grad_x * out_scale ~= fp8 * fp8_scale.
        grad_norm: (I,) in the dtype of the weight; empty without a norm.
    """
    rows, inputs = grad.shape
    rounded = rows if out_scale is not None else 0
    grad_x = x.new_empty((rows if has_grad else 0, 2 * inputs))
    fp8 = x.new_empty((rounded, 2 * inputs), dtype=FP8)
    fp8_scale = x.new_empty((rounded, 1), dtype=torch.float32)
    first, rest = column_blocks(inputs)
    num_warps = min(16, max(4, power_of_2(inputs / 256)))
    # With 16 warps a program keeps a multiprocessor busy by itself, as it loads two rows ahead (H200).
    programs = min(rows, (1 if num_warps == 16 else 32 // num_warps) * multiprocessors(x.device))
    parts = x.new_empty((0 if norm_weight is None else programs, inputs), dtype=torch.float32)
    with on_device_of(x):
        _gated_backward[(programs,)](
            grad,
            x,
            norm_weight,
            rstd,
            out_scale,
            grad_x,
            fp8,
            fp8_scale,
            parts,
            rows,
            inputs,
            ACTIVATION=activation,
            HAS_NORM=norm_weight is not None,
            HAS_GRAD=has_grad,
            HAS_FP8=out_scale is not None,
            PER_ROW=per_row,
            COLUMNS=first,
            MORE_COLUMNS=rest,
            STAGES=3 if inputs >= 2048 else 2,
            num_warps=num_warps,
        )
    grad_norm = x.new_empty((0,)) if norm_weight is None else column_sums(parts, norm_weight.dtype)
    return grad_x, fp8, fp8_scale, grad_norm
