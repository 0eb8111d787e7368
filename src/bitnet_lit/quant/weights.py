"""A weight rule says how a weight matrix is rounded. A granularity says which of its weights share a scale.

A rule takes a latent weight, float (O, I), and returns codes and scales. The scales multiply, everywhere::

    weight ~= codes * weight_scale

    granularity     weight_scale
    PerTensor()     ()            one for the matrix, as all BitNet papers have it
    PerRow()        (O, 1)        one for each output; "per channel" in some papers
    PerGroup(n)     (O, I / n)    one for each n inputs of a row; "blocks" in llama.cpp

`spread_scale` gives scales of each shape a shape that broadcasts against the weights.

Rules are frozen dataclasses, so two rules are equal when they round alike. A kernel or a format lists the rules that it
supports, and checks whether the scheme's rule is one of them. This module does not import torch: the native engine
reads the rules, and importing torch would take longer than starting the engine.

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
    """A granularity says which weights share a scale. Subclasses are frozen dataclasses with torchao's names."""

    @abstractmethod
    def scale_shape(self, rows: int, inputs: int) -> tuple[int, ...]:
        """Return the shape of the scales of a (rows, inputs) matrix.

        Raises:
            UserError: the group size does not divide `inputs`.
        """

    @abstractmethod
    def mean(self, magnitude: Tensor) -> Tensor:
        """Return the mean of the weights that share a scale, for each scale; (O, I) -> `scale_shape`."""

    @abstractmethod
    def median(self, magnitude: Tensor) -> Tensor:
        """Return the lower median of the weights that share a scale, for each scale; (O, I) -> `scale_shape`."""


def matrix_mean(matrix: Tensor) -> Tensor:
    """Return the mean of a matrix (O, I), the same for every number of CPU threads.

    PyTorch divides the sum of more than 32768 numbers among its threads, so the last bit of the mean depends on how
    many there are. A weight at a rounding border then gets another code, and the same training another result on
    another machine, or beside other jobs. A row is never divided.
    """
    if matrix.device.type != "cpu" or matrix.numel() <= 32768:  # at::internal::GRAIN_SIZE
        return matrix.mean()
    return matrix.mean(-1).mean()


@dataclass(frozen=True)
class PerTensor(Granularity):
    """All weights of a matrix share one scale."""

    def scale_shape(self, rows: int, inputs: int) -> tuple[int, ...]:
        """Return (), the shape of one number."""
        return ()

    def mean(self, magnitude: Tensor) -> Tensor:
        return matrix_mean(magnitude)

    def median(self, magnitude: Tensor) -> Tensor:
        return magnitude.median()

    def __str__(self) -> str:
        return "one for the matrix"


@dataclass(frozen=True)
class PerRow(Granularity):
    """The weights of a row share a scale: there is one for each output."""

    def scale_shape(self, rows: int, inputs: int) -> tuple[int, ...]:
        """Return (rows, 1)."""
        return rows, 1

    def mean(self, magnitude: Tensor) -> Tensor:
        return magnitude.mean(dim=1, keepdim=True)

    def median(self, magnitude: Tensor) -> Tensor:
        return magnitude.median(dim=1, keepdim=True).values

    def __str__(self) -> str:
        return "one for each row"


@dataclass(frozen=True)
class PerGroup(Granularity):
    """Each `group_size` neighbouring inputs of a row share a scale."""

    group_size: int

    def scale_shape(self, rows: int, inputs: int) -> tuple[int, ...]:
        """Return (rows, inputs / group_size).

        Raises:
            UserError: `group_size` does not divide `inputs`.
        """
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
        return self._groups(magnitude).mean(dim=-1)

    def median(self, magnitude: Tensor) -> Tensor:
        return self._groups(magnitude).median(dim=-1).values

    def __str__(self) -> str:
        return f"one for {self.group_size} inputs"


def spread_scale(weight_scale: Tensor, inputs: int) -> Tensor:
    """Return scales in a shape that broadcasts against the weights.

    Args:
        weight_scale: (), (1,), (O, 1) or (O, G).
        inputs: I, a multiple of G.

    Returns:
        `weight_scale` itself, or (O, I) where a row has several scales.
    """
    if weight_scale.ndim < 2 or weight_scale.shape[1] == 1:
        return weight_scale
    return weight_scale.unsqueeze(-1).expand(-1, -1, inputs // weight_scale.shape[1]).flatten(1)


class WeightRule(ABC):
    """A weight rule turns a matrix into codes and scales. Subclasses are frozen dataclasses.

    Attributes:
        levels: the codes that can occur, integers that int8 holds, ascending.
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
            codes: integers as float32, shape (O, I), each one of `levels`.
            weight_scale: float32, in the shape that `granularity` gives, greater than 0;
                ``weight ~= codes * weight_scale``.
        """

    def scale(self, weight: Tensor) -> Tensor:
        """Return the scales that `quantize` returns."""
        return self.quantize(weight)[1]

    def statistics(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the scale and the center of a matrix, where these two numbers are enough to round each weight.

        They are saved with latent weights, so that an engine that supports the rule can round without torch.

        Args:
            weight: float32, shape (O, I).

        Returns:
            weight_scale: float32, shape ().
            center: float32, shape (). The distance of a weight from it is rounded.
            None in place of both, where rounding needs more than these two numbers.
        """
        return None


class _Ternary(WeightRule):
    """This rule divides weights by their scale and rounds to the nearest of -1, 0 and +1.

    Subclasses say how the scale is computed.
    """

    levels = (-1, 0, 1)

    @abstractmethod
    def _typical(self, magnitude: Tensor) -> Tensor: ...

    def scale(self, weight: Tensor) -> Tensor:
        """See `WeightRule`."""
        return self._typical(weight.float().abs()).clamp(min=SCALE_MIN)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight, scale = weight.float(), self.scale(weight)
        # Microsoft and Hugging Face multiply by the reciprocal and do not divide; the two round some ties differently.
        return (weight * spread_scale(1.0 / scale, weight.shape[1])).round().clamp(-1, 1), scale

    def statistics(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `WeightRule`. There are two numbers only where the matrix has one scale."""
        if self.granularity != PerTensor():
            return None
        scale = self.scale(weight)
        return scale, scale.new_zeros(())


@dataclass(frozen=True)
class AbsMean(_Ternary):
    """The rule of BitNet b1.58 takes the mean magnitude of the weights as their scale."""

    granularity: Granularity = PerTensor()

    def _typical(self, magnitude: Tensor) -> Tensor:
        return self.granularity.mean(magnitude)


@dataclass(frozen=True)
class AbsMedian(_Ternary):
    """The rule of BitNet b1.58 Reloaded takes the median magnitude of the weights as their scale."""

    granularity: Granularity = PerTensor()

    def _typical(self, magnitude: Tensor) -> Tensor:
        return self.granularity.median(magnitude)


@dataclass(frozen=True)
class Sign(WeightRule):
    """The rule of BitNet (b1) codes each weight as the sign of its distance from the mean.

    The scale is the mean magnitude of the weights. ``sign(0)`` counts as +1: a weight that equals the mean needs a code
    that one bit can store.
    """

    levels = (-1, 1)

    @property
    def granularity(self) -> Granularity:
        """One scale for the matrix, as in the paper."""
        return PerTensor()

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.float()
        scale, center = self.statistics(weight)
        return (weight >= center).float() * 2 - 1, scale

    def statistics(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return matrix_mean(weight.abs()).clamp(min=SCALE_MIN), matrix_mean(weight)
