"""How the activations that enter a quantized projection are rounded: one class for each rule of the papers.

A rule takes the activations of a layer and gives whole numbers and one scale per token::

    x ~= codes * x_scale            codes: -128..127 at 8 bits

Rules are frozen dataclasses, so two of them are equal when they round alike: a kernel or a format lists the rules that
it computes, and asks whether the scheme's is among them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SCALE_MIN = 1e-5  # Training Tips, figure 3: keeps an all-zero tensor from dividing by zero


class ActivationRule(ABC):
    """How activations become codes. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Width of a code, 2 to 8: codes are kept as int8 for the backward pass."""

    @abstractmethod
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round activations.

        Args:
            x: float, shape (B..., I).

        Returns:
            codes: whole numbers as float32, shape (B..., I).
            x_scale: float32, shape (B..., 1); ``x ~= codes * x_scale``.
        """


@dataclass(frozen=True)
class AbsMax(ActivationRule):
    """Each token is divided by its largest magnitude (Training Tips, figure 3)."""

    bits: int = 8

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `ActivationRule`."""
        x = x.float()
        limit = 2 ** (self.bits - 1) - 1
        amax = x.abs().amax(dim=-1, keepdim=True).clamp(min=SCALE_MIN)
        codes = (x * (limit / amax)).round().clamp(-limit - 1, limit)
        return codes, amax / limit
