"""Linear layers with the same input, behind their norm, as one autograd function (csrc/linears.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bitnet_lit.native import library
from bitnet_lit.native.library import address
from bitnet_lit.native.projections import keep_inputs, limit, rounded


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors (B..., O) side by side, (M, sum of O): without a copy, if that is how they lie in memory."""
    first, at = parts[0], parts[0].data_ptr()
    row = first.stride(-2) if first.ndim > 1 else first.shape[-1]
    strides = [1, row]
    for size in reversed(first.shape[1:-1]):
        strides.append(strides[-1] * size)
    for part in parts:
        if part.data_ptr() != at or list(part.stride()) != strides[first.ndim - 1 :: -1]:
            return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts], dim=1)
        at += 4 * part.shape[-1]
    return first.as_strided((first.shape[:-1].numel(), sum(part.shape[-1] for part in parts)), (row, 1))


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor | None, eps: float, layers: Sequence[nn.Linear], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        x = x.contiguous()
        inputs, most = x.shape[-1], limit(layers[0])
        tokens = x.numel() // inputs
        matrices = [rounded(layer) for layer in layers]
        sizes = [matrix.weight.shape[0] for matrix in matrices]
        threads, has_codes = torch.get_num_threads(), all(matrix.has_codes for matrix in matrices)
        a = library.Linears(tokens, inputs, len(layers), most is not None, has_codes, threads, most or 0.0)
        a.fork, a.norm.eps = library.fork(), eps
        call = library.Call(a)
        for matrix, struct in zip(matrices, a.matrices, strict=False):
            matrix.fill(call, struct)
        y = x.new_empty(*x.shape[:-1], sum(sizes))
        a.y = y.data_ptr()
        call.point(a, x=x)
        call.point(a.norm, weight=gain, rstd=x.new_empty(tokens))
        keep_inputs(call, a.h, tokens, inputs, most is not None)
        call.run("linears_forward")
        call.save(ctx)
        ctx.sizes, ctx.shape, ctx.has_norm = sizes, x.shape, gain is not None
        return y.split(sizes, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, a = ctx.call, ctx.call.arguments
        d_y = _side_by_side(grads)
        d_x, d_weight = d_y.new_empty(ctx.shape), d_y.new_empty(sum(ctx.sizes), a.inputs)
        d_gain = d_y.new_empty(a.inputs) if ctx.has_norm else None
        a.d_y, a.d_y_row, a.d_x = d_y.data_ptr(), d_y.stride(0), d_x.data_ptr()
        a.d_norm, a.d_weight = address(d_gain), d_weight.data_ptr()
        call.run_backward("linears_backward", ctx)
        return d_x, d_gain, None, None, *d_weight.split(ctx.sizes)


def normed_linears(x: Tensor, gain: Tensor | None, eps: float, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """Return layer(norm(x)) of each layer, without biases; float32 (B..., I) -> (B..., O).

    Args:
        gain: the weight of the norm, or None where there is no norm.
        layers: of one scheme, at most three.
    """
    outputs: tuple[Tensor, ...] = _Linears.apply(x, gain, eps, layers, *[layer.weight for layer in layers])
    return outputs
