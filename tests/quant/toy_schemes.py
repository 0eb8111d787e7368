"""Three schemes as a user writes them, in a file of one's own; tests train, save and export them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitnet_lit.quant import BitLinear, Scheme
from bitnet_lit.quant.weights import AbsMean, Granularity, PerRow, PerTensor, WeightRule, spread_scale


@dataclass(frozen=True)
class ThresholdRule(WeightRule):
    """Ternary Weight Networks (arXiv 1605.04711): zero below a part of the mean magnitude."""

    factor: float

    levels = (-1, 0, 1)

    @property
    def granularity(self) -> Granularity:
        return PerTensor()

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.float()
        codes = weight.sign() * (weight.abs() > self.factor * weight.abs().mean())
        return codes, (weight * codes).sum() / codes.abs().sum().clamp(min=1) + 1e-5


@dataclass(frozen=True)
class Threshold(Scheme):
    """Ternary with one scale for the matrix: what every ternary kernel can run."""

    name = "threshold"
    title = "ternary weights by a threshold"
    factor: float = 0.7

    @property
    def weights(self) -> WeightRule:
        return ThresholdRule(self.factor)


@dataclass(frozen=True)
class QuinaryRule(WeightRule):
    """Five levels, a scale for each row."""

    levels = (-2, -1, 0, 1, 2)

    @property
    def granularity(self) -> Granularity:
        return PerRow()

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.float()
        scale = PerRow().mean(weight.abs()).clamp(min=1e-5)
        return (weight / spread_scale(scale, weight.shape[1])).round().clamp(-2, 2), scale


@dataclass(frozen=True)
class Quinary(Scheme):
    """What two bits do not hold."""

    name = "quinary"
    title = "weights of five levels"

    @property
    def weights(self) -> WeightRule:
        return QuinaryRule()


class CenteredLinear(BitLinear):
    """Takes the mean from its input before it is rounded."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - input.mean(-1, keepdim=True))


class GainedLinear(BitLinear):
    """Multiplies its output by a gain that is learned, and by a constant that is not."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **options) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self.gain = nn.Parameter(torch.ones(out_features))
        self.register_buffer("constant", torch.tensor([0.5]))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.gain * self.constant


@dataclass(frozen=True)
class Gained(Scheme):
    """Ternary weights in a layer with tensors of its own."""

    name = "gained"
    title = "ternary weights, a learned gain for each output"
    layer = GainedLinear

    @property
    def weights(self) -> WeightRule:
        return AbsMean()

    def own_tensors(self, rows: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {"gain": (rows,), "constant": (1,)}


@dataclass(frozen=True)
class Centered(Scheme):
    """Ternary weights in a layer of its own."""

    name = "centered"
    title = "ternary weights, centered activations"
    layer = CenteredLinear

    @property
    def weights(self) -> WeightRule:
        return AbsMean()
