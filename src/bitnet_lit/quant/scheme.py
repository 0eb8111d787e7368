"""A quantization scheme is one object that answers every question about how a network is quantized.

A scheme has a rule for weights (`weights`, see weights.py), a rule for activations (`activations`, see activations.py),
a name and settings. Everything else follows from the two rules: the levels of a code, which weights share a scale, bits
per weight, how many codes a byte holds. No other code compares the name of a scheme:

- layers round by `weights.quantize` and `activations.quantize`, and multiply as `weight ~= codes * scale`;
- accounting, the health callback and packing read levels, granularity and bits;
- a format or an engine has conditions of its own ("one scale for the matrix, codes -1, 0 and +1"), and says which of
  them a scheme does not meet. A kernel lists the rules that it supports; rules are equal when they round alike.

Two things do not belong to the scheme. Which layers stay dense (`skip`) depends on the network, and the warm-up of
lambda, from full precision to quantized, depends on the run. `QuantConfig` in config/network.py holds all three, as the
command line does.

The settings of a scheme are the fields of its class, and they are plain data. `describe` returns them with the name, as
config.json stores them, and `schemes.scheme_named` makes the scheme again. The built-in schemes are in schemes.py.

This is a scheme of your own, in a file of your own::

    @register
    @dataclass(frozen=True)
    class Threshold(Scheme):
        name = "threshold"
        title = "ternary weights by a threshold"
        factor: float = 0.7                                   # quant.settings.factor=0.8

        @property
        def weights(self):
            return ThresholdRule(self.factor)                 # a WeightRule: levels, granularity, quantize

On the command line it is `quant._target_=my_project.Threshold`.

The layer of a scheme may compute more than a product of codes, such as a Hadamard transform before it, or scales that
are learned. Such a scheme names its `layer`, a subclass of BitLinear, and lists the further tensors of that layer in
`own_tensors`. It can be saved in a latent model folder; formats that store codes refuse it. They hold it where what the
layer computes is a product of codes after all: then the scheme says that it `is_plain`, and `rule_with` gives the rule
that its own tensors make.

This module does not import torch: the native engine reads schemes, and may run without torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bitnet_lit.quant.activations import AbsMax, ActivationRule
from bitnet_lit.quant.weights import Granularity, PerTensor, WeightRule

if TYPE_CHECKING:
    from torch import Tensor

    from bitnet_lit.quant.bit_linear import BitLinear

SCALE_BITS = 32  # a float32; a format that rounds scales counts its own bits
TERNARY = (-1, 0, 1)


@dataclass(frozen=True)
class Scheme(ABC):
    """A scheme says how a projection is quantized. Subclasses are frozen dataclasses whose fields are its settings.

    Attributes:
        name: its name in config files and on the command line.
        title: its description, for tables and model cards.
        layer: a subclass of BitLinear, where BitLinear itself does not compute the scheme. `layer_for` chooses by name.
        ignores: settings of other schemes that it accepts and ignores; all others are refused.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    layer: ClassVar[type[BitLinear] | None] = None
    ignores: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def weights(self) -> WeightRule | None:
        """The rule by which weights are rounded; None where nothing is rounded."""

    @property
    def activations(self) -> ActivationRule:
        """The rule by which activations are rounded."""
        return AbsMax(8)

    def layer_for(self, name: str) -> type[BitLinear] | None:
        """Return the class of one layer; None where it is BitLinear itself.

        Args:
            name: the full name of the layer in its network, such as "model.layers.0.mlp.down_proj".
        """
        return self.layer

    def rule_with(self, own: Mapping[str, Tensor]) -> WeightRule | None:
        """Return the rule by which one layer rounds its weights; None where nothing is rounded.

        Args:
            own: the layer's own tensors, by their names in `own_tensors`.
        """
        return self.weights

    def check_sizes(self, rows: int, inputs: int) -> None:
        """Refuse a (rows, inputs) matrix that the scheme cannot round.

        Raises:
            UserError: the group size of the scheme does not divide `inputs`.
        """
        self.granularity.scale_shape(rows, inputs)

    def own_tensors(self, rows: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the parameters and buffers that `layer` has beside weight and bias.

        They are saved with the model and read back; the parameters are trained. `layer` makes them in its constructor,
        without `device=`.

        Args:
            rows: out_features of the layer.
            inputs: in_features of the layer.
        """
        return {}

    @property
    def quantizes(self) -> bool:
        """Whether the scheme rounds anything; only the dense twin does not."""
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
        """Bits of information in the code of a weight: log2(3) = 1.58 for three levels; 32 for float32 weights."""
        return math.log2(len(self.levels)) if self.levels else 32.0

    @property
    def is_ternary(self) -> bool:
        """Whether every code is -1, 0 or +1, so that two bits hold it and ternary kernels can multiply by it.

        This is so for b1 too, whose codes are -1 and +1.
        """
        return self.quantizes and set(self.levels) <= set(TERNARY)

    @property
    def codes_per_byte(self) -> int:
        """The number of codes in a byte of a packed matrix: 4 where two bits hold a code, otherwise 1."""
        return 4 if self.is_ternary else 1

    @property
    def is_plain(self) -> bool:
        """Whether a layer computes only the product of activation codes and weight codes, and applies the scales.

        Its own tensors, if it has any, are then a part of the codes and scales (`rule_with`).
        """
        return self.layer is None and type(self).layer_for is Scheme.layer_for

    @property
    def transforms_inputs(self) -> bool:
        """Whether layers transform their inputs, so that weights of a network without that would compute nonsense."""
        return False

    def bits_per_weight(self, rows: int, inputs: int) -> float:
        """Return the bits per weight of a (rows, inputs) matrix: the information of a code, and a share of the scales.

        Raises:
            UserError: see `check_sizes`.
        """
        self.check_sizes(rows, inputs)
        if not self.quantizes:
            return self.code_bits
        scales = math.prod(self.granularity.scale_shape(rows, inputs))
        return self.code_bits + SCALE_BITS * scales / (rows * inputs)

    def describe(self) -> dict[str, Any]:
        """Return the name and the settings as plain data. `schemes.scheme_named` makes the scheme from them again."""
        return {"name": self.name, **asdict(self)}

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in asdict(self).items())
        return f"{self.name} ({settings})" if settings else self.name


def is_skipped(name: str, skip: Sequence[str]) -> bool:
    """Return whether a layer stays dense: an entry of `skip` is its name, or the last parts of its dotted name."""
    return any(name == entry or name.endswith("." + entry) for entry in skip)
