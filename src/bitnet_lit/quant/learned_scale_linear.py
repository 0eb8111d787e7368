"""The layer that trains the gain of its scales (learned_scale.py)."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_lit.quant.bit_linear import BitLinear, integer_product, straight_through
from bitnet_lit.quant.kernels.choose import chosen
from bitnet_lit.quant.learned_scale import GAIN_MIN, LearnedScale
from bitnet_lit.quant.scheme import Scheme
from bitnet_lit.quant.weights import WeightRule


def _base(scheme: Scheme) -> WeightRule:
    return cast(LearnedScale, scheme.weights).base


def _trained(gain: Tensor, weight: Tensor) -> Tensor:
    """Return the gains as they are used, with a gradient that is divided by the root of the weights of a scale."""
    share = 1 / math.sqrt(weight.numel() / gain.numel())
    return gain.detach().clamp(min=GAIN_MIN) + (gain - gain.detach()) * share


def learned_scale_reference(
    x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor | None, scheme: Scheme, strength: Tensor | float = 1.0
) -> Tensor:
    """Compute the layer as it is defined. The arguments are those of `bit_linear_reference`.

    Args:
        gain: float, (1,) or (O, 1).
    """
    x_codes, x_scale = scheme.activations.quantize(x)
    codes, scale = _base(scheme).quantize(weight.detach())
    x = straight_through(x, (x_codes * x_scale).to(x.dtype), strength)
    rounded = _trained(gain, weight) * straight_through(weight, (codes * scale).to(weight.dtype))
    return F.linear(x, weight + strength * (rounded - weight), bias)


class LearnedScaleLinear(BitLinear):
    """A LearnedScaleLinear is a BitLinear whose scales are multiplied by a gain that is trained.

    Attributes:
        scale_gain: float32, (1,), or (O, 1) where each row has a scale.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **options: Any) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self._weights = _base(self.scheme)  # by which kernels round
        self.scale_gain = nn.Parameter(torch.ones(self.scheme.own_tensors(out_features, in_features)["scale_gain"]))

    def quantized_weight(self) -> tuple[Tensor, Tensor]:
        """See `BitLinear`."""
        rule = self.scheme.rule_with({"scale_gain": self.scale_gain})
        assert rule is not None
        return rule.quantize(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        if self.strength is not None:
            return learned_scale_reference(input, self.weight, self.scale_gain, self.bias, self.scheme, self.strength)
        gain = _trained(self.scale_gain, self.weight)
        if self._parameters["bias"] is None and (kernels := chosen([self], input)) is not None and kernels.takes_single:
            y = kernels.normed_linears(input, None, [self])[0]
            return (y * gain.flatten()).to(y.dtype)
        codes, scale = _base(self.scheme).quantize(self.weight.detach())
        weight = self.weight * gain.detach()  # not read: its gradient is that of gain * rounded weight
        y = integer_product(input, weight, codes, scale * gain.reshape(scale.shape), self._activations)
        return y if self.bias is None else y + self.bias
