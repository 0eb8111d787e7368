"""The final norm, the head and the cross-entropy as one autograd function (csrc/loss.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet_lit.native import library
from bitnet_lit.native.library import address


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, head: Tensor, targets: Tensor) -> Tensor:
        x, head, targets = x.contiguous(), head.contiguous(), targets.contiguous()
        tokens = targets.numel()
        losses = x.new_empty(tokens)
        gradients = torch.empty_like(x), torch.empty_like(gain), torch.empty_like(head)
        call = library.Loss(tokens, x.shape[-1], head.shape[0], torch.get_num_threads(), eps, library.fork())
        call.x, call.gain, call.head, call.targets, call.losses = map(address, (x, gain, head, targets, losses))
        call.d_x, call.d_gain, call.d_head = map(address, gradients)
        library.functions()["loss"](call)
        ctx.save_for_backward(*gradients)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if grads[0] != 1:  # it is 1 where this loss itself is differentiated, and then a large copy is saved
            gradients = torch._foreach_mul(gradients, grads[0])
        d_x, d_gain, d_head = gradients
        return d_x, d_gain, None, d_head, None


def next_token_loss(x: Tensor, gain: Tensor, eps: float, head: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of the logits norm(x) @ head.T, float32 ().

    The forward pass computes the gradients too.

    Args:
        x: float32 (B..., D).
        gain: the weight of the final norm, (D,).
        head: (V, D).
        targets: int64 (B...).
    """
    loss: Tensor = _Loss.apply(x, gain, eps, head, targets)
    return loss
