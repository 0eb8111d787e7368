"""BitNet v2 turns the inputs of o_proj and down_proj by a Hadamard matrix before it rounds them.

The outputs of attention and of the gated feed-forward layer have a few channels that are much larger than the others.
Rounded to 4 bits with one scale per token, the others become 0. A Hadamard matrix H has entries of -1 and +1 and rows
that are orthogonal, so H x / sqrt(n) has the length of x, and each of its n elements is a sum of all of x: no channel
stands out, and the distribution comes close to a normal one. The layer then computes::

    y = (rounded(H x / sqrt(n)) @ weight_codes.T) * scales

The weight is trained behind H, so nothing has to be undone. H is symmetric and H H = n I: the transform is its own
inverse, and its own gradient.

H exists here for powers of two, H_1 = [1] and H_2n = [[H_n, H_n], [H_n, -H_n]] (Sylvester's order). An input of another
size is cut into blocks of the largest power of two that divides it, each of which is transformed alone: 192 is 3 blocks
of 64.

Source: BitNet v2 (arXiv 2504.18415), H-BitLinear: the transform stands between the norm and the rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitnet_lit.quant.bit_linear import BitLinear, in_dtype


def block_size(size: int) -> int:
    """Return the largest power of two that divides `size`."""
    return size & -size


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _transform(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (grad_y,) = grad_outputs
        return _transform(grad_y)


def _transform(x: Tensor) -> Tensor:
    """Return the transform by log2(n) passes, each of which adds and subtracts pairs (fast Walsh-Hadamard)."""
    size = block_size(x.shape[-1])
    y, pairs = x.float().unflatten(-1, (-1, size)), 1
    while pairs < size:
        y = y.unflatten(-1, (-1, 2, pairs))
        first, second = y[..., 0, :], y[..., 1, :]
        y = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        pairs *= 2
    turned: Tensor = y.flatten(-2) / math.sqrt(size)
    return in_dtype(turned, x.dtype)


def hadamard(x: Tensor) -> Tensor:
    """Return the orthonormal Hadamard transform of the last axis, in blocks of the largest power of two.

    Args:
        x: float, shape (B..., I).

    Returns:
        float, shape (B..., I), in the dtype of x; computed in float32.
    """
    y: Tensor = _Hadamard.apply(x)  # type: ignore[no-untyped-call]
    return y


class HadamardLinear(BitLinear):
    """A HadamardLinear is a BitLinear whose input is transformed before it is rounded."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(hadamard(input))
