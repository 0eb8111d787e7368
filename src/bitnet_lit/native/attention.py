"""Causal attention with rotary positions as one autograd function (csrc/attention.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet_lit.native import library
from bitnet_lit.native.library import address


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, size = q.shape
        head_dim = cos.shape[-1]
        rows = {part.stride()[:2] for part in (q, k, v)}
        if rows != {(length * q.stride(1), q.stride(1))} or any(part.stride(2) != 1 for part in (q, k, v)):
            sizes = [part.shape[-1] for part in (q, k, v)]
            q, k, v = torch.cat([q, k, v], dim=-1).split(sizes, dim=-1)
        cos, sin = cos.contiguous(), sin.contiguous()
        heads, kv_heads = size // head_dim, k.shape[-1] // head_dim
        y, log_sum = q.new_empty(batch, length, size), q.new_empty(batch, heads, length)
        a = library.Attention(batch, length, heads, kv_heads, head_dim, torch.get_num_threads(), q.stride(1))
        a.fork = library.fork()
        call = library.Call(a)
        call.point(a, q=q, k=k, v=v, cos=cos, sin=sin, y=y, log_sum=log_sum)
        call.run("attention_forward")
        call.save(ctx)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, a, d_y = ctx.call, ctx.call.arguments, grads[0].contiguous()
        # One tensor, so that the projections of q, k and v get their gradients side by side.
        size, kv_size = a.heads * a.head_dim, a.kv_heads * a.head_dim
        d_qkv = d_y.new_empty(a.batch, a.length, size + 2 * kv_size)
        gradients = d_qkv.split([size, kv_size, kv_size], dim=-1)
        a.d_y, a.d_row = d_y.data_ptr(), d_qkv.shape[-1]
        a.d_q, a.d_k, a.d_v = map(address, gradients)
        call.run_backward("attention_backward", ctx)
        return *gradients, None, None


def rotary_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return causal self-attention of q and k, which are rotated first; float32.

    Args:
        q: (B, T, H * P). k and v: (B, T, K * P).
        cos: (T, P), as `sin`.

    Returns:
        (B, T, H * P).
    """
    y: Tensor = _Attention.apply(q, k, v, cos, sin)
    return y
