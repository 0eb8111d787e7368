"""The norm of the gradient, and how it is limited.

These are `get_total_norm` and `clip_grads_with_norm_` of `torch.nn.utils` for tensors on one device, with the same
numbers. PyTorch's functions sort the gradients by device and dtype first, each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_lit.training.sharing import whole


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients together: float, (), on their device, the same on every rank.

    Under DDP the gradients are averaged already, and under FSDP2 the squares of all shards are summed. Nothing waits
    for the device.
    """
    return whole(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))


def clip_gradients(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients whose norm together exceeds `limit` down to it, in place. Nothing waits for the device."""
    torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
