"""How weights are rounded: one class for each rule of the papers, and how many weights share a scale.

A rule takes a latent weight, float (O, I), and gives codes and scales. One convention everywhere::

    weight ~= codes * weight_scale

    granularity     weight_scale
    PerTensor()     ()            one for the matrix, as all BitNet papers have it
    PerRow()        (O, 1)        one for each output; "per channel" in some papers
    PerGroup(n)     (O, I / n)    one for each n inputs of a row; "blocks" in llama.cpp

`spread_scale` lays scales of each shape beside the weights that they multiply.

Rules are frozen dataclasses, so two of them are equal when they round alike: a kernel or a format lists the rules that
it computes, and asks whether the scheme's is among them. This module imports no torch: the native engine asks the rules
what they are, and starts faster than torch is imported.

Axis letters: O out_features, I in_features.

Sources: "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, unilm repository) for absmean; BitNet
(arXiv 2310.11453) for the sign; "BitNet b1.58 Reloaded" (arXiv 2407.09527) for absmedian.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bitnet_lit.errors import UserError
from bitnet_lit.quant.activations import SCALE_MIN

if TYPE_CHECKING:
    from torch import Tensor


class Granularity(ABC):
    """Which weights share a scale. Subclasses are frozen dataclasses; the words are torchao's."""

    @abstractmethod
    def scale_shape(self, rows: int, inputs: int) -> tuple[int, ...]:
        """Shape of the scales of a (rows, inputs) matrix.

        Raises:
            UserError: groups that do not fill a row.
        """

    @abstractmethod
    def mean(self, magnitude: Tensor) -> Tensor:
        """Means over the weights that share a scale; (O, I) -> `scale_shape`."""

    @abstractmethod
    def median(self, magnitude: Tensor) -> Tensor:
        """Lower medians over the weights that share a scale; (O, I) -> `scale_shape`."""


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the matrix."""

    def scale_shape(self, rows: int, inputs: int) -> tuple[int, ...]:
        """The shape (): one number."""
        return ()

    def mean(self, magnitude: Tensor) -> Tensor:
        """See `Granularity`."""
        return magnitude.mean()

    def median(self, magnitude: Tensor) -> Tensor:
        """See `Granularity`."""
        return magnitude.median()

    def __str__(self) -> str:
        return "one for the matrix"


@dataclass(frozen=True)
class PerRow(Granularity):
    """One scale for each row of the matrix, that is, for each output."""

    def scale_shape(self, rows: int, inputs: int) -> tuple[int, ...]:
        """The shape (O, 1)."""
        return rows, 1

    def mean(self, magnitude: Tensor) -> Tensor:
        """See `Granularity`."""
        return magnitude.mean(dim=1, keepdim=True)

    def median(self, magnitude: Tensor) -> Tensor:
        """See `Granularity`."""
        return magnitude.median(dim=1, keepdim=True).values

    def __str__(self) -> str:
        return "one for each row"


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each `group_size` inputs of a row."""

    group_size: int

    def scale_shape(self, rows: int, inputs: int) -> tuple[int, ...]:
        """The shape (O, I / group_size)."""
        if inputs % self.group_size:
            raise UserError(
                f"rows of {inputs} inputs do not divide into groups of {self.group_size}: take a group_size that "
                f"divides {inputs}, or sizes of the model that are multiples of {self.group_size}"
            )
        return rows, inputs // self.group_size

    def _groups(self, magnitude: Tensor) -> Tensor:
        groups: Tensor = magnitude.unflatten(1, (-1, self.group_size))  # (O, I) -> (O, groups, group_size)
        return groups

    def mean(self, magnitude: Tensor) -> Tensor:
        """See `Granularity`."""
        return self._groups(magnitude).mean(dim=-1)

    def median(self, magnitude: Tensor) -> Tensor:
        """See `Granularity`."""
        return self._groups(magnitude).median(dim=-1).values

    def __str__(self) -> str:
        return f"one for {self.group_size} inputs"


def spread_scale(weight_scale: Tensor, inputs: int) -> Tensor:
    """Scales beside the weights that they multiply.

    Args:
        weight_scale: (), (1,), (O, 1) or (O, G).
        inputs: I, a multiple of G.

    Returns:
        The same numbers in a shape that broadcasts against (O, I); a copy only where a row has several.
    """
    if weight_scale.ndim < 2 or weight_scale.shape[1] == 1:
        return weight_scale
    return weight_scale.unsqueeze(-1).expand(-1, -1, inputs // weight_scale.shape[1]).flatten(1)


class WeightRule(ABC):
    """How a matrix becomes codes. Subclasses are frozen dataclasses.

    Attributes:
        levels: the codes it gives, whole numbers of one byte, ascending.
    """

    levels: ClassVar[tuple[int, ...]]

    @property
    @abstractmethod
    def granularity(self) -> Granularity:
        """Which weights share a scale."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Round a matrix.

        Args:
            weight: latent weight, float, shape (O, I).

        Returns:
            codes: whole numbers as float32, shape (O, I), each of `levels`.
            weight_scale: float32, `granularity`'s shape, greater than 0; ``weight ~= codes * weight_scale``.
        """

    def statistics(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """The two numbers by which each weight of a float32 matrix is rounded on its own.

        They are noted beside latent weights, so that an engine which knows this very rule can round without torch.

        Returns:
            weight_scale: float32, shape (). center: float32, shape (); what is rounded is the distance from it.
            None: there are more numbers than these two, or a code depends on other weights too.
        """
        return None


class _Ternary(WeightRule):
    """Weights over their scale, rounded to the nearest of -1, 0 and +1; how the scale is found, subclasses say."""

    levels = (-1, 0, 1)

    @abstractmethod
    def _typical(self, magnitude: Tensor) -> Tensor: ...

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightRule`."""
        weight = weight.float()
        scale = self._typical(weight.abs()).clamp(min=SCALE_MIN)
        # Multiplying by the reciprocal, not dividing, is what Microsoft and Hugging Face do: it decides ties.
        return (weight * spread_scale(1.0 / scale, weight.shape[1])).round().clamp(-1, 1), scale

    def statistics(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `WeightRule`; of a scale per tensor only."""
        if self.granularity != PerTensor():
            return None
        scale = self._typical(weight.abs()).clamp(min=SCALE_MIN)
        return scale, scale.new_zeros(())


@dataclass(frozen=True)
class AbsMean(_Ternary):
    """BitNet b1.58: the scale is the mean magnitude."""

    granularity: Granularity = PerTensor()

    def _typical(self, magnitude: Tensor) -> Tensor:
        return self.granularity.mean(magnitude)


@dataclass(frozen=True)
class AbsMedian(_Ternary):
    """BitNet b1.58 Reloaded: the scale is the median magnitude."""

    granularity: Granularity = PerTensor()

    def _typical(self, magnitude: Tensor) -> Tensor:
        return self.granularity.median(magnitude)


@dataclass(frozen=True)
class Sign(WeightRule):
    """BitNet (b1): the sign of a weight's distance from the mean; the scale is the mean magnitude.

    ``sign(0)`` is +1: a weight equal to the mean must still get a code that one bit can store.
    """

    levels = (-1, 1)

    @property
    def granularity(self) -> Granularity:
        """The paper knows one scale for the matrix."""
        return PerTensor()

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightRule`."""
        weight = weight.float()
        scale, center = self.statistics(weight)
        return (weight >= center).float() * 2 - 1, scale

    def statistics(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `WeightRule`."""
        return weight.abs().mean().clamp(min=SCALE_MIN), weight.mean()
