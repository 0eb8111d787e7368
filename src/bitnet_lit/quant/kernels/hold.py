"""Weights that are rounded once per optimizer step, where a step has several forward passes.

A layer rounds its weights at each forward pass. With accumulated gradients `HeldWeights` rounds them before the first
batch of a step, and the layers use the codes until they are released::

    held = HeldWeights(groups)      # the layers that are computed together
    held.round(torch.bfloat16)      # before the first forward pass of an optimizer step
    ...
    held.release()                  # before the weights change

Nothing looks whether a weight changes in between, because `torch.compile` and CUDA graphs could not look either. So the
codes are held only while nothing changes the weights: between two optimizer steps, and not in validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bitnet_lit.quant.bit_linear import BitLinear
from bitnet_lit.quant.kernels.choose import chosen


class HeldWeights:
    """The rounded weights of a network, for the forward passes of one optimizer step.

    The codes are written to the same memory at each step, where a CUDA graph finds them.

    Args:
        groups: layers that are computed together; see `model.layers.joint_layers`.
    """

    def __init__(self, groups: Sequence[Sequence[BitLinear]]) -> None:
        self._groups = [list(group) for group in groups]
        self._kept: list[Any] = [None] * len(groups)

    def round(self, dtype: torch.dtype) -> None:
        """Round all weights, and let the layers use the codes until `release`.

        Weights that are shards of a matrix (FSDP) are left to the forward pass, which has the whole matrix.

        Args:
            dtype: the dtype of the layers' products (autocast's).
        """
        for number, group in enumerate(self._groups):
            whole = all(type(layer.weight) is nn.Parameter and layer.weight.ndim == 2 for layer in group)
            kernels = chosen(group, group[0].weight) if whole else None
            if kernels is not None:
                self._kept[number] = group[0].held = kernels.hold(group, dtype, self._kept[number])

    def release(self) -> None:
        """Let the layers round their weights at each forward pass again."""
        for group in self._groups:
            group[0].held = None
