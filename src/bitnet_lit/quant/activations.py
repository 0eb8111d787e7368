"""An activation rule says how the activations that enter a quantized projection are rounded.

A rule takes the activations of a layer and returns integer codes, with one scale per token::

    x ~= codes * x_scale            codes: -128..127 at 8 bits

Rules are frozen dataclasses, so two rules are equal when they round alike. A kernel or a format lists the rules that it
supports, and checks whether the scheme's rule is one of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SCALE_MIN = 1e-5  # Training Tips, figure 3: keeps an all-zero tensor from dividing by zero


class ActivationRule(ABC):
    """An activation rule turns activations into integer codes. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code, 2 to 8. Codes are kept as int8 for the backward pass."""

    @abstractmethod
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Round activations.

        Args:
            x: float, shape (B..., I).

        Returns:
            codes: integers as float32, shape (B..., I).
            x_scale: float32, shape (B..., 1); ``x ~= codes * x_scale``.
        """


@dataclass(frozen=True)
class AbsMax(ActivationRule):
    """This rule scales each token by its largest magnitude (Training Tips, figure 3)."""

    bits: int = 8

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        limit = 2 ** (self.bits - 1) - 1
        amax = x.abs().amax(dim=-1, keepdim=True).clamp(min=SCALE_MIN)
        codes = (x * (limit / amax)).round().clamp(-limit - 1, limit)
        return codes, amax / limit


@dataclass(frozen=True)
class AbsMeanActivations(ActivationRule):
    """This rule scales each token by its mean magnitude, and clips what is larger (BitNet a4.8 and BitNet v2).

    For 4 bits the papers write ``beta / sqrt(7) * clamp(round(sqrt(7) / beta * x), -8, 7)`` with ``beta = mean(|x|)``.
    Of few codes absmax spends most on the rare large values: normally distributed activations of 1024 elements are
    rounded in steps of half their deviation, and here in steps of 0.3. For other bits, which the papers round by
    absmax, 7 is the largest code.
    """

    bits: int = 4

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        limit = 2 ** (self.bits - 1) - 1
        step = x.abs().mean(dim=-1, keepdim=True).clamp(min=SCALE_MIN) / math.sqrt(limit)
        return (x * (1.0 / step)).round().clamp(-limit - 1, limit), step
