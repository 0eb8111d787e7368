"""The layer that trains the gain of its scales (learned_scale.py)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_lit.quant.bit_linear import BitLinear, integer_product, straight_through
from bitnet_lit.quant.learned_scale import LearnedScale
from bitnet_lit.quant.scheme import Scheme

GAIN = "scale_gain"


def _rounded(
    weight: Tensor, gain: Tensor, rule: LearnedScale, strength: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes and scales of a matrix, and the tensor that gets the gradient of the rounded matrix.

    That tensor has the values of `weight`. It hands its gradient on to `weight`, and to `gain` by LSQ's rule.
    """
    scale = rule.scale_with(weight.detach(), gain.detach())
    codes = rule.codes(weight.detach(), scale)
    slope = strength * rule.slope(weight.detach(), codes, scale)
    return codes, scale, weight + ((gain - gain.detach()) * slope).to(weight.dtype)


def learned_scale_reference(
    x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor | None, scheme: Scheme, strength: Tensor | float = 1.0
) -> Tensor:
    """Compute the layer as it is defined. The arguments are those of `bit_linear_reference`.

    Args:
        gain: float, (1,) or (O, 1).
    """
    codes, scale, latent = _rounded(weight, gain, cast(LearnedScale, scheme.weights), strength)
    x_codes, x_scale = scheme.activations.quantize(x)
    x = straight_through(x, (x_codes * x_scale).to(x.dtype), strength)
    return F.linear(x, straight_through(latent, (codes * scale).to(latent.dtype), strength), bias)


class LearnedScaleLinear(BitLinear):
    """A LearnedScaleLinear is a BitLinear whose scales are multiplied by a gain that is trained.

    Attributes:
        scale_gain: float32, (1,), or (O, 1) where each row has a scale.
    """

    reference_because = "scales are learned"

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **options: Any) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self._rule = cast(LearnedScale, self._weights)
        self.scale_gain = nn.Parameter(torch.ones(self.scheme.own_tensors(out_features, in_features)[GAIN]))

    def quantized_weight(self) -> tuple[Tensor, Tensor]:
        """See `BitLinear`."""
        rule = self.scheme.rule_with({GAIN: self.scale_gain})
        assert rule is not None
        return rule.quantize(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        if self.strength is not None:
            return learned_scale_reference(input, self.weight, self.scale_gain, self.bias, self.scheme, self.strength)
        codes, scale, latent = _rounded(self.weight, self.scale_gain, self._rule, 1.0)
        y = integer_product(input, latent, codes, scale, self._activations)
        return y if self.bias is None else y + self.bias
