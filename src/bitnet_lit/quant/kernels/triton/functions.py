"""The autograd functions that are made of the kernels: layers that read one normed input, and a gated MLP.

The forward pass of a group of layers is three operations::

    weight_codes, weight_scale = round_weights(weights)            weights.py
    x_codes, x_scale           = norm_round(x)                     norm_round.py
    y                          = x_codes @ weight_codes.T, scaled  int8_product.py

and the backward pass, where `dtype` is that of y::

    grad_n       = grad_y * weight_scale @ weight_codes     in FP8 (fp8_rows.py), or in `dtype`
    grad_weight  = grad_y.T @ (x_codes * x_scale)           in FP8, or in `dtype` (weight_gradient.py)
    grad_x       = backward pass of the norm of grad_n      norm_backward.py

Kept for the backward pass are x, the int8 codes and the scales. x is the residual stream, or what attention returns,
which is kept anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitnet_lit.quant.kernels.triton.fp8_rows import fp8_rows
from bitnet_lit.quant.kernels.triton.gated_backward import gated_backward
from bitnet_lit.quant.kernels.triton.int8_product import int8_product
from bitnet_lit.quant.kernels.triton.norm_backward import norm_backward
from bitnet_lit.quant.kernels.triton.norm_round import norm_round
from bitnet_lit.quant.kernels.triton.rotary import rotary_backward
from bitnet_lit.quant.kernels.triton.weight_gradient import weight_gradient, weight_gradient_fp8
from bitnet_lit.quant.kernels.triton.weights import round_weights

LARGEST_CODE, LARGEST_FP8 = 128, 448  # of int8, and of float8_e4m3fn


class RoundedWeights(NamedTuple):
    """The matrices of one product, as `round_weights` returns them."""

    codes: Tensor
    transposed: Tensor
    scale: Tensor


class LatentWeights(NamedTuple):
    """LatentWeights holds what the backward pass must know of the latent weights of one product.

    The weights themselves are not kept for it, so nothing depends on whether they have changed since.

    Attributes:
        rows: of each matrix.
        dtype: of the matrices.
        per_row: whether each row has a scale of its own.
    """

    rows: list[int]
    dtype: torch.dtype
    per_row: bool


def _latent(weights: Sequence[Tensor], rounding: Rounding) -> LatentWeights:
    return LatentWeights([weight.shape[0] for weight in weights], weights[0].dtype, rounding.rule.endswith("_row"))


@dataclass(frozen=True)
class Rounding:
    """How a group of layers is rounded and computed.

    Attributes:
        rule: the rule of the weights, a key of `weights.RULES`.
        bits: of an activation code.
        dtype: of the outputs of the layers.
        fp8: whether output gradients are rounded to FP8 for the gradient of the input.
        fp8_weights: whether they are for the gradient of the weights, too.
    """

    rule: str
    bits: int
    dtype: torch.dtype
    fp8: bool
    fp8_weights: bool

    def rounds_for_weights(self, x: Tensor) -> bool:
        """Return whether the gradient of the weights is an FP8 product: it sums over tokens in blocks of 16."""
        return self.fp8_weights and x.shape[0] % 16 == 0


class OutputGradient(NamedTuple):
    """The gradient of a product's output, in the forms in which its backward pass needs it.

    Attributes:
        plain: in its own dtype, (M, O); not needed (and without rows) where both products are in FP8.
        fp8: times the scales of the weights, in FP8, (M, O); not needed where no product is.
        fp8_scale: float32 (M, 1), the scales of the rows of `fp8`.
    """

    plain: Tensor
    fp8: Tensor
    fp8_scale: Tensor


def _product_gradients(
    grad: OutputGradient,
    x_codes: Tensor,
    x_scale: Tensor,
    rounded_weights: RoundedWeights,
    weights: LatentWeights,
    fp8_weights: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of the normed input, (M, I), and of each weight, from that of the joint output.

    Args:
        x_codes, x_scale: as `norm_round` returns them.
        weights: the latent weights whose gradients are returned.
        fp8_weights: whether the gradient of the weights is an FP8 product too.
    """
    codes, transposed, scale = rounded_weights
    plain, fp8, fp8_scale = grad
    if transposed.numel() == 0:
        normed = (plain * scale).to(plain.dtype) @ codes.to(plain.dtype)
    else:
        ones = scale.new_ones((1, transposed.shape[0]))
        normed = torch._scaled_mm(
            fp8, transposed.t(), scale_a=fp8_scale, scale_b=ones, out_dtype=plain.dtype, use_fast_accum=True
        )
    if fp8_weights:
        row_scale = fp8_scale * x_scale
        whole = (row_scale.amax() * (LARGEST_CODE / LARGEST_FP8)).clamp(min=1e-30)  # all gradients may be zero
        joint = weight_gradient_fp8(
            fp8, x_codes, row_scale / whole, whole, 1 / scale, weights.rows, weights.per_row, weights.dtype
        )
    else:
        joint = weight_gradient(plain, (x_codes * x_scale).to(plain.dtype), weights.dtype)
    return normed, list(joint.split(weights.rows))


def _output_gradient(grad: Tensor, rounded_weights: RoundedWeights) -> OutputGradient:
    """Return the gradient of an output in its own dtype, and in FP8 where the weights are."""
    grad = grad.contiguous()
    if rounded_weights.transposed.numel() == 0:
        nothing = grad.new_empty((0, grad.shape[1]))
        return OutputGradient(grad, nothing, nothing)
    return OutputGradient(grad, *fp8_rows(grad, rounded_weights.scale))


def _norm_gradients(grad: Tensor, x: Tensor, norm_weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and of the norm's weight, from that of the normed x."""
    if norm_weight is None:
        return grad.to(x.dtype), None
    grad_x, grad_norm = norm_backward(grad, x, norm_weight, rstd)
    return grad_x.to(x.dtype), grad_norm


class NormedLinearsFunction(torch.autograd.Function):
    """Compute the outputs of layers that read one normed input, side by side: (M, I) -> (M, sum of O)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        eps: float,
        rounding: Rounding,
        held: RoundedWeights | None,
        *weights: Tensor,
    ) -> Tensor:
        codes, transposed, scale = held or round_weights(weights, rounding.rule, rounding.fp8)
        x_codes, x_scale, rstd = norm_round(x, norm_weight, eps, "", rounding.bits)
        ctx.fp8_weights, ctx.weights = rounding.rounds_for_weights(x), _latent(weights, rounding)
        ctx.save_for_backward(x, norm_weight, rstd, x_codes, x_scale, codes, transposed, scale)
        y: Tensor = int8_product(x_codes, codes, x_scale, scale, rounding.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, norm_weight, rstd, x_codes, x_scale, codes, transposed, scale = ctx.saved_tensors
        held = RoundedWeights(codes, transposed, scale)
        normed, grad_weights = _product_gradients(
            _output_gradient(grad, held), x_codes, x_scale, held, ctx.weights, ctx.fp8_weights
        )
        return *_norm_gradients(normed, x, norm_weight, rstd), None, None, None, *grad_weights


class RotatedHeadsFunction(torch.autograd.Function):
    """Compute the heads of attention from its input: (M, I) -> rotated queries, rotated keys, values.

    Each is (B, T, heads, head_dim), a view of the joint output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        eps: float,
        rounding: Rounding,
        held: RoundedWeights | None,
        cos: Tensor,
        sin: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        codes, transposed, scale = held or round_weights([q, k, v], rounding.rule, rounding.fp8)
        x_codes, x_scale, rstd = norm_round(x, norm_weight, eps, "", rounding.bits)
        ctx.fp8_weights, ctx.weights = rounding.rounds_for_weights(x), _latent([q, k, v], rounding)
        ctx.save_for_backward(x, norm_weight, rstd, x_codes, x_scale, codes, transposed, scale, cos, sin)
        (length, size), rows = cos.shape, (q.shape[0], k.shape[0], v.shape[0])
        rotated_heads = (rows[0] + rows[1]) // size
        joint = int8_product(x_codes, codes, x_scale, scale, rounding.dtype, cos, sin, rotated_heads)
        heads = joint.view(-1, length, joint.shape[1] // size, size)
        kv_heads = rows[1] // size
        return (
            heads[:, :, : rows[0] // size],
            heads[:, :, rows[0] // size : rotated_heads],
            heads[:, :, rotated_heads : rotated_heads + kv_heads],
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, rstd, x_codes, x_scale, codes, transposed, scale, cos, sin = ctx.saved_tensors
        grad_q, grad_k, grad_v = grad_outputs
        out_scale = scale if transposed.numel() > 0 else None
        grad = OutputGradient(*rotary_backward(grad_q, grad_k, grad_v, cos, sin, out_scale, not ctx.fp8_weights))
        held = RoundedWeights(codes, transposed, scale)
        normed, grad_weights = _product_gradients(grad, x_codes, x_scale, held, ctx.weights, ctx.fp8_weights)
        return *_norm_gradients(normed, x, norm_weight, rstd), None, None, None, None, None, *grad_weights


class GatedMLPFunction(torch.autograd.Function):
    """Compute down(sub_norm(activation(gate(norm(x))) * up(norm(x)))): (M, I) -> (M, O)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        eps: float,
        activation: str,
        sub_norm_weight: Tensor | None,
        sub_eps: float,
        rounding: Rounding,
        held: RoundedWeights | None,
        held_down: RoundedWeights | None,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
    ) -> Tensor:
        codes, transposed, scale = held or round_weights([gate, up], rounding.rule, rounding.fp8)
        x_codes, x_scale, rstd = norm_round(x, norm_weight, eps, "", rounding.bits)
        gate_up = int8_product(x_codes, codes, x_scale, scale, rounding.dtype)
        down_codes, down_transposed, down_scale = held_down or round_weights([down], rounding.rule, rounding.fp8)
        h_codes, h_scale, h_rstd = norm_round(gate_up, sub_norm_weight, sub_eps, activation, rounding.bits)
        ctx.activation, ctx.fp8_weights = activation, rounding.rounds_for_weights(x)
        ctx.weights, ctx.down = _latent([gate, up], rounding), _latent([down], rounding)
        ctx.save_for_backward(
            *(x, norm_weight, rstd, x_codes, x_scale, codes, transposed, scale),
            *(gate_up, sub_norm_weight, h_rstd, h_codes, h_scale, down_codes, down_transposed, down_scale),
        )
        y: Tensor = int8_product(h_codes, down_codes, h_scale, down_scale, rounding.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, norm_weight, rstd, x_codes, x_scale, codes, transposed, scale, *rest = ctx.saved_tensors
        gate_up, sub_norm_weight, h_rstd, h_codes, h_scale, down_codes, down_transposed, down_scale = rest
        held, held_down = (
            RoundedWeights(codes, transposed, scale),
            RoundedWeights(down_codes, down_transposed, down_scale),
        )
        grad_h, grad_down = _product_gradients(
            _output_gradient(grad, held_down), h_codes, h_scale, held_down, ctx.down, ctx.fp8_weights
        )
        *grad_gate_up, grad_sub_norm = gated_backward(
            *(grad_h, gate_up, sub_norm_weight, h_rstd, ctx.activation),
            *(scale if transposed.numel() > 0 else None, ctx.weights.per_row, not ctx.fp8_weights),
        )
        normed, grad_weights = _product_gradients(
            OutputGradient(*grad_gate_up), x_codes, x_scale, held, ctx.weights, ctx.fp8_weights
        )
        sub_norm = (None if sub_norm_weight is None else grad_sub_norm, None)
        own = (None, None, None)  # the rounding and the weights that are held
        return *_norm_gradients(normed, x, norm_weight, rstd), None, None, *sub_norm, *own, *grad_weights, *grad_down
