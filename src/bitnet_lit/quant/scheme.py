"""A quantization scheme as an object: everything that the rest of the project asks about it, in one place.

A scheme says how weights are rounded (`weights`, a rule of weights.py) and how activations are (`activations`, a rule
of activations.py), what it is called, and which settings it has. Everything else follows from the two rules: the levels
of a code, which weights share a scale, bits per weight, how many codes a byte holds. Nobody compares a scheme's name:

- layers round by `weights.quantize` and `activations.quantize`, and multiply as `weight ~= codes * scale`;
- accounting, the health callback and packing ask for levels, granularity and bits;
- a format or an engine has conditions of its own ("one scale for the matrix, codes -1, 0 and +1"), and says which one a
  scheme does not meet. A kernel lists the rules that it computes; rules are equal when they round alike.

What is *not* the scheme's: which layers it leaves dense (`skip`: that is the network's), and how training leads over to
it (lambda's warm-up: that is the run's). `QuantConfig` in config/network.py holds all three, as the command line does.

A scheme's settings are the fields of its class, plain data. `describe` gives them with its name, as config.json keeps
them, and `schemes.scheme_named` makes the scheme again. The schemes that there are stand in schemes.py.

A scheme of your own, in a file of your own::

    @register
    @dataclass(frozen=True)
    class Threshold(Scheme):
        name = "threshold"
        title = "ternary weights by a threshold"
        factor: float = 0.7                                   # quant.settings.factor=0.8

        @property
        def weights(self):
            return ThresholdRule(self.factor)                 # a WeightRule: levels, granularity, quantize

and on the command line `quant._target_=my_project.Threshold`.

A scheme whose layer computes something else than a product of codes (a Hadamard transform in front of it, scales that
are learned) also names a `layer`, a subclass of BitLinear, and in `own_tensors` what that layer has to be saved. A
latent model folder holds it, and formats of codes refuse it.

This module imports no torch: the native engine asks for a scheme before torch is imported, if it ever is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bitnet_lit.quant.activations import AbsMax, ActivationRule
from bitnet_lit.quant.weights import Granularity, PerTensor, WeightRule

if TYPE_CHECKING:
    from bitnet_lit.quant.bit_linear import BitLinear

SCALE_BITS = 32  # a float32; formats that round scales say so themselves
TERNARY = (-1, 0, 1)


@dataclass(frozen=True)
class Scheme(ABC):
    """How a projection is quantized. Subclasses are frozen dataclasses whose fields are plain settings.

    Attributes:
        name: what config files and the command line call it.
        title: what it is in words, for tables and model cards.
        layer: a subclass of BitLinear where that class alone does not compute the scheme.
        ignores: keys of other schemes that it takes without reading them; others are refused.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    layer: ClassVar[type[BitLinear] | None] = None
    ignores: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def weights(self) -> WeightRule | None:
        """How weights are rounded; None only where nothing is."""

    @property
    def activations(self) -> ActivationRule:
        """How activations are rounded."""
        return AbsMax(8)

    def own_tensors(self, rows: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Parameters and buffers that `layer` has beside weight and bias: their names in it, with their shapes.

        They are saved with the model, read back, and trained. `layer` makes them in its constructor, without `device=`.
        """
        return {}

    @property
    def quantizes(self) -> bool:
        """Whether anything is rounded at all."""
        return self.weights is not None

    @property
    def levels(self) -> tuple[int, ...]:
        """The codes of weights, ascending; () where nothing is rounded."""
        return () if self.weights is None else self.weights.levels

    @property
    def granularity(self) -> Granularity:
        """Which weights share a scale."""
        return PerTensor() if self.weights is None else self.weights.granularity

    @property
    def code_bits(self) -> float:
        """Information in a weight's code: log2(3) = 1.58 for three levels; 32 for float32 weights."""
        return math.log2(len(self.levels)) if self.levels else 32.0

    @property
    def is_ternary(self) -> bool:
        """Whether every code is -1, 0 or +1, which two bits hold, and ternary kernels multiply; b1 too."""
        return self.quantizes and set(self.levels) <= set(TERNARY)

    @property
    def codes_per_byte(self) -> int:
        """Codes of a packed matrix in one byte, one below the other: four where two bits hold a code, otherwise one."""
        return 4 if self.is_ternary else 1

    @property
    def is_plain(self) -> bool:
        """Whether a layer computes a product of activation codes and weight codes, with scales, and nothing else."""
        return self.layer is None

    def bits_per_weight(self, rows: int, inputs: int) -> float:
        """Bits of a weight of a (rows, inputs) matrix: its code's information, and its share of the scales."""
        if not self.quantizes:
            return self.code_bits
        scales = math.prod(self.granularity.scale_shape(rows, inputs))
        return self.code_bits + SCALE_BITS * scales / (rows * inputs)

    def describe(self) -> dict[str, Any]:
        """Name and settings as plain data; `schemes.scheme_named` takes them."""
        return {"name": self.name, **asdict(self)}

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in asdict(self).items())
        return f"{self.name} ({settings})" if settings else self.name


def is_skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether a layer stays dense: an entry of `skip` is its name, or the last parts of its dotted name."""
    return any(name == entry or name.endswith("." + entry) for entry in skip)
