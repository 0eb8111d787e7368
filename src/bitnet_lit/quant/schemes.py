"""This module has the built-in quantization schemes and finds a scheme by its name.

`scheme.py` says what a scheme is, and `registry.py` how a class of your own is registered. A model folder can name a
scheme, but it cannot make us import code: a scheme that its user has neither installed nor registered is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from bitnet_lit.errors import UserError
from bitnet_lit.quant.activations import AbsMax, AbsMeanActivations, ActivationRule
from bitnet_lit.quant.learned_scale import LearnedScale
from bitnet_lit.quant.scheme import SCALE_BITS, Scheme
from bitnet_lit.quant.three_of_four import BLOCK, ThreeOfFour
from bitnet_lit.quant.weights import AbsMean, AbsMedian, Granularity, PerGroup, PerRow, PerTensor, Sign, WeightRule
from bitnet_lit.registry import Registry, with_settings

if TYPE_CHECKING:
    from torch import Tensor

    from bitnet_lit.quant.bit_linear import BitLinear

SCHEMES: Registry[Scheme] = Registry(
    Scheme,  # type: ignore[type-abstract]  # its subclasses are registered
    what="quantization scheme",
    key="quant.name",
    group="bitnet_lit.schemes",
    remedy="name the class of your own scheme: quant._target_=<module>.<class> to train, schemes=[<module>.<class>] to "
    "open a model, bitnet_lit.quant.register in Python",
    reserved=("name", "skip", "lambda_warmup_steps", "lambda_warmup_shape"),
)
register = SCHEMES.register


def _check_bits(activation_bits: int) -> None:
    if not 2 <= activation_bits <= 8:
        raise UserError(f"quant.activation_bits={activation_bits}: must lie in 2..8 (codes are stored as int8)")


def activation_bits_of(name: str) -> int:
    """Return the bits of activations that a scheme has unless `quant.activation_bits` says others.

    Raises:
        UserError: the name is unknown.
    """
    defaults = {setting.name: setting.default for setting in fields(SCHEMES.named(name))}
    bits = defaults.get("activation_bits")
    return bits if isinstance(bits, int) else 8


@register
@dataclass(frozen=True)
class B158(Scheme):
    """BitNet b1.58 has ternary weights, one scale for each matrix, and activations of 8 bits or less."""

    name = "b158"
    title = "ternary weights (b1.58: -1, 0, +1)"
    weight_scale: str = "absmean"
    """absmean (BitNet b1.58) or absmedian (BitNet b1.58 Reloaded, arXiv 2407.09527)."""
    activation_bits: int = 8

    def __post_init__(self) -> None:
        if self.weight_scale not in ("absmean", "absmedian"):
            raise UserError(f"quant.weight_scale={self.weight_scale}: must be one of absmean, absmedian")
        _check_bits(self.activation_bits)

    def _granularity(self) -> Granularity:
        return PerTensor()

    def _rule(self) -> WeightRule:  # torch.compile cannot trace `super().weights` in a subclass
        return (AbsMedian if self.weight_scale == "absmedian" else AbsMean)(self._granularity())

    @property
    def weights(self) -> WeightRule:
        """The rule that rounds to the nearest of -1, 0 and +1."""
        return self._rule()

    @property
    def activations(self) -> ActivationRule:
        """The rule that scales each token by its largest magnitude."""
        return AbsMax(self.activation_bits)


@register
@dataclass(frozen=True)
class B158Row(B158):
    """This is b1.58 with one scale for each row. So a row of small weights is not rounded to zeros."""

    name = "b158_row"
    title = "ternary weights (b1.58: -1, 0, +1), a scale for each row"

    def _granularity(self) -> Granularity:
        return PerRow()


@register
@dataclass(frozen=True)
class B158Group(B158):
    """This is b1.58 with one scale for each group of inputs, as in GPTQ, llama.cpp's blocks and torchao's PerGroup."""

    name = "b158_group"
    title = "ternary weights (b1.58: -1, 0, +1), scales for groups of inputs"
    group_size: int = 128
    """Inputs of a row that share a scale. It must divide in_features of every projection. 64 and 128 are usual."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise UserError(f"quant.settings.group_size={self.group_size}: must be 2 or more")

    def _granularity(self) -> Granularity:
        return PerGroup(self.group_size)


@register
@dataclass(frozen=True)
class B1(Scheme):
    """The first BitNet has binary weights, rounded around their mean, and activations of 8 bits or less."""

    name = "b1"
    title = "binary weights (b1: -1, +1)"
    activation_bits: int = 8

    def __post_init__(self) -> None:
        _check_bits(self.activation_bits)

    @property
    def weights(self) -> WeightRule:
        """The rule that rounds a weight to the sign of its distance from the mean."""
        return Sign()

    @property
    def activations(self) -> ActivationRule:
        """The rule that scales each token by its largest magnitude."""
        return AbsMax(self.activation_bits)


@register
@dataclass(frozen=True)
class LearnedB158(B158):
    """This is b1.58 with a trained gain on the scale of each matrix or row (`learned_scale.py`)."""

    name = "b158_learned"
    title = "ternary weights (b1.58: -1, 0, +1), learned scales"
    per_row: bool = False
    """Whether each row has a scale and a gain of its own, instead of the whole matrix."""

    def _granularity(self) -> Granularity:
        return PerRow() if self.per_row else PerTensor()

    @property
    def weights(self) -> WeightRule:
        """The rule of b1.58 with gains of 1."""
        return LearnedScale(self._rule())

    def rule_with(self, own: Mapping[str, Tensor]) -> WeightRule:
        """The rule of b1.58 with the layer's gain."""
        return LearnedScale(self._rule(), own["scale_gain"])

    def layer_for(self, name: str) -> type[BitLinear]:
        """The layer that trains the gain."""
        from bitnet_lit.quant.learned_scale_linear import LearnedScaleLinear

        return LearnedScaleLinear

    def own_tensors(self, rows: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of the gain."""
        return {"scale_gain": (rows, 1) if self.per_row else (1,)}

    @property
    def is_plain(self) -> bool:
        """It is: the gain is a factor of the scale."""
        return True


@register
@dataclass(frozen=True)
class Sherry(Scheme):
    """Sherry (arXiv 2601.07892) has three ternary weights of four that are not 0: 1.25 bits of information a weight.

    Formats and engines of ternary codes hold it, in the 2 bits that they have for each.
    """

    name = "sherry"
    title = "ternary weights, three of four not 0 (Sherry)"
    activation_bits: int = 8

    def __post_init__(self) -> None:
        _check_bits(self.activation_bits)

    @property
    def weights(self) -> WeightRule:
        """The rule that makes the smallest of four neighbouring weights 0."""
        return ThreeOfFour()

    @property
    def activations(self) -> ActivationRule:
        """The rule that scales each token by its largest magnitude."""
        return AbsMax(self.activation_bits)

    @property
    def code_bits(self) -> float:
        """Bits of information in a code: a block of four has 4 * 2**3 values, which are 5 bits."""
        return math.log2(BLOCK * 2 ** (BLOCK - 1)) / BLOCK

    def check_sizes(self, rows: int, inputs: int) -> None:
        """Refuse a matrix whose rows do not divide into blocks of four."""
        if inputs % BLOCK:
            raise UserError(
                f"rows of {inputs} inputs do not divide into blocks of {BLOCK} weights: take a multiple of {BLOCK}"
            )


@register
@dataclass(frozen=True)
class Tequila(B158):
    """Tequila (arXiv 2509.23809) is b1.58 with a bias that is computed from the weights whose code is 0."""

    name = "tequila"
    title = "ternary weights (b1.58: -1, 0, +1), a bias of the weights that are 0 (Tequila)"
    bias_factor: float = 1e-3
    """The factor lambda of the paper, by which these weights are multiplied."""

    def layer_for(self, name: str) -> type[BitLinear]:
        """The layer with the bias."""
        from bitnet_lit.quant.dead_zone import DeadZoneLinear

        return DeadZoneLinear

    @property
    def is_plain(self) -> bool:
        """False, because of the bias."""
        return False

    def bits_per_weight(self, rows: int, inputs: int) -> float:
        """Return the bits of b1.58 and those of a float32 bias for each output."""
        return super().bits_per_weight(rows, inputs) + SCALE_BITS / inputs


@register
@dataclass(frozen=True)
class BitNetV2(B158):
    """BitNet v2 (arXiv 2504.18415) is b1.58 for 4-bit activations: Hadamard transforms before o_proj and down_proj.

    The paper trains with 8 bits first, and with 4 for the last twentieth of the tokens.
    """

    name = "bitnet_v2"
    title = "ternary weights (b1.58: -1, 0, +1), Hadamard transforms (BitNet v2)"
    activation_bits: int = 4
    hadamard: bool = True
    """Whether the inputs of o_proj and down_proj are transformed."""
    activation_scale: str = "absmean"
    """absmean (BitNet v2 with 4 bits, clips large activations) or absmax (with 8 bits, and b1.58)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_scale not in ("absmean", "absmax"):
            raise UserError(f"quant.settings.activation_scale={self.activation_scale}: must be one of absmean, absmax")

    @property
    def activations(self) -> ActivationRule:
        """The rule that scales each token by its mean or by its largest magnitude."""
        return (AbsMeanActivations if self.activation_scale == "absmean" else AbsMax)(self.activation_bits)

    def layer_for(self, name: str) -> type[BitLinear] | None:
        """The layer with the transform for o_proj and down_proj, whose inputs have the large channels."""
        from bitnet_lit.quant.hadamard import HadamardLinear

        is_transformed = self.hadamard and name.rpartition(".")[2] in ("o_proj", "down_proj")
        return HadamardLinear if is_transformed else None

    @property
    def transforms_inputs(self) -> bool:
        """Whether the inputs of o_proj and down_proj are transformed."""
        return self.hadamard

    @property
    def is_plain(self) -> bool:
        """Whether there is no transform."""
        return not self.hadamard


@register
@dataclass(frozen=True)
class Dense(Scheme):
    """The dense twin is the same network with nothing rounded."""

    name = "none"
    title = "dense weights"
    ignores = ("weight_scale", "activation_bits")  # so that a sweep can set them for a BitNet and its twin alike

    @property
    def weights(self) -> None:
        """None, because nothing is rounded."""


def scheme_named(name: str, settings: Mapping[str, Any] | None = None) -> Scheme:
    """Make a scheme from its name and settings, as `Scheme.describe` returns them.

    Raises:
        UserError: the name is unknown, the scheme has no such setting, or a value is refused.
    """
    return with_settings(SCHEMES.named(name), settings or {}, f"quant={name}")
