"""The gated feed-forward layer as one autograd function (csrc/gated_mlp.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bitnet_lit.native import library
from bitnet_lit.native.library import address
from bitnet_lit.native.projections import keep_inputs, limit, rounded


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor | None,
        sub_gain: Tensor | None,
        eps: tuple[float, float],
        relu2: bool,
        layers: Sequence[nn.Linear],
        *weights: Tensor,
    ) -> Tensor:
        x = x.contiguous()
        hidden, most = x.shape[-1], limit(layers[0])
        tokens = x.numel() // hidden
        gate, up, down = matrices = [rounded(layer) for layer in layers]
        ffn, quantized = gate.weight.shape[0], most is not None
        threads, has_codes = torch.get_num_threads(), all(matrix.has_codes for matrix in matrices)
        a = library.GatedMlp(tokens, hidden, ffn, relu2, quantized, has_codes, threads, most or 0.0)
        a.fork = library.fork()
        call = library.Call(a)
        gate.fill(call, a.gate_up[0])
        up.fill(call, a.gate_up[1])
        down.fill(call, a.down)
        for norm, weight, value in ((a.norm, gain, eps[0]), (a.sub_norm, sub_gain, eps[1])):
            norm.eps = value
            call.point(norm, weight=weight, rstd=x.new_empty(tokens))
        keep_inputs(call, a.h, tokens, hidden, quantized)
        keep_inputs(call, a.hf, tokens, ffn, quantized)
        y = torch.empty_like(x)
        a.y = y.data_ptr()
        call.point(a, x=x, gates=x.new_empty(tokens, 2 * ffn))
        call.run("gated_mlp_forward")
        call.save(ctx)
        ctx.has_norms = gain is not None, sub_gain is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, a, d_y = ctx.call, ctx.call.arguments, grads[0].contiguous()
        d_x = torch.empty_like(d_y)
        d_gate_up, d_down = d_y.new_empty(2 * a.ffn, a.hidden), d_y.new_empty(a.hidden, a.ffn)
        sizes = zip(ctx.has_norms, (a.hidden, a.ffn), strict=True)
        d_gain, d_sub_gain = (d_y.new_empty(size) if has_norm else None for has_norm, size in sizes)
        a.d_y, a.d_x, a.d_gate_up, a.d_down = map(address, (d_y, d_x, d_gate_up, d_down))
        a.d_norm, a.d_sub_norm = address(d_gain), address(d_sub_gain)
        call.run_backward("gated_mlp_backward", ctx)
        return d_x, d_gain, d_sub_gain, None, None, None, *d_gate_up.split(a.ffn), d_down


def gated_mlp(
    x: Tensor,
    gain: Tensor | None,
    sub_gain: Tensor | None,
    eps: tuple[float, float],
    relu2: bool,
    layers: Sequence[nn.Linear],
) -> Tensor:
    """Return down(sub_norm(act(gate(norm(x))) * up(norm(x)))), without biases; float32 (B..., D) -> (B..., D).

    Args:
        gain: the weight of the norm, or None where there is no norm; `sub_gain` is that of the other.
        eps: of the two norms.
        relu2: whether act is relu(x)**2 and not silu.
        layers: gate, up and down, of one scheme.
    """
    y: Tensor = _GatedMlp.apply(x, gain, sub_gain, eps, relu2, layers, *[layer.weight for layer in layers])
    return y
