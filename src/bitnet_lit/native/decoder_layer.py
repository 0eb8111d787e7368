"""A whole decoder layer as one autograd function (csrc/decoder_layer.h).

One function for a layer instead of one for each of its parts saves what autograd and Python cost between the parts:
a tenth of a step of the demo's size. It computes the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bitnet_lit.native import library
from bitnet_lit.native.library import address
from bitnet_lit.native.projections import limit, rounded


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: Sequence[float],
        relu2: bool,
        layers: Sequence[nn.Linear],
        *parameters: Tensor | None,
    ) -> Tensor:
        x, cos, sin, most = x.contiguous(), cos.contiguous(), sin.contiguous(), limit(layers[0])
        matrices, gains = [rounded(layer) for layer in layers], parameters[len(layers) :]
        q, k, _, _, gate, _, _ = (len(matrix.weight) for matrix in matrices)
        batch, length, hidden = x.shape
        head_dim = cos.shape[-1]
        a = library.DecoderLayer(batch, length, hidden, gate, q // head_dim, k // head_dim, head_dim, relu2)
        a.quantized, a.int8, a.limit = most is not None, all(matrix.has_codes for matrix in matrices), most or 0.0
        a.threads, a.fork = torch.get_num_threads(), library.fork()
        call = library.Call(a)
        for matrix, struct in zip(matrices, a.matrices, strict=True):
            matrix.fill(call, struct)
        for norm, gain, value in zip(a.norms, gains, eps, strict=True):
            norm.eps = value
            call.point(norm, weight=gain)
        call.run("decoder_layer_forward")  # sets kept_floats
        y = torch.empty_like(x)
        a.y = y.data_ptr()
        call.point(a, x=x, cos=cos, sin=sin, kept=x.new_empty(a.kept_floats))
        call.run("decoder_layer_forward")
        call.save(ctx)
        ctx.shapes = [None if parameter is None else parameter.shape for parameter in parameters]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, a, d_y = ctx.call, ctx.call.arguments, grads[0].contiguous()
        d_x = torch.empty_like(d_y)
        shapes = [shape for shape in ctx.shapes if shape is not None]
        d_parameters = d_y.new_empty(sum(shape.numel() for shape in shapes))
        a.d_y, a.d_x, a.d_parameters = map(address, (d_y, d_x, d_parameters))
        call.run_backward("decoder_layer_backward", ctx)
        parts = iter(d_parameters.split([shape.numel() for shape in shapes]))
        gradients = [None if shape is None else next(parts).view(shape) for shape in ctx.shapes]
        return d_x, None, None, None, None, None, *gradients


def decoder_layer(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    gains: Sequence[Tensor | None],
    eps: Sequence[float],
    relu2: bool,
    layers: Sequence[nn.Linear],
) -> Tensor:
    """Return m + mlp(m) with m = x + o(sub_norm(attention(norm(x)))); float32 (B, T, D) -> (B, T, D).

    Args:
        cos: (T, P), as `sin`.
        gains: the weights of the norms before q, o, gate and down; None where there is no norm. `eps` is theirs.
        relu2: whether the activation is relu(x)**2 and not silu.
        layers: q, k, v, o, gate, up and down, of one scheme, without biases.
    """
    y: Tensor = _DecoderLayer.apply(x, cos, sin, eps, relu2, layers, *[layer.weight for layer in layers], *gains)
    return y
