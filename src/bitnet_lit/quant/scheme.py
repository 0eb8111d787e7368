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
them, and `scheme_named` makes the scheme again. Names are looked up among the classes below, those that `register` was
given, and the entry points of installed packages (group "bitnet_lit.schemes"). So a model folder can name a scheme, but
never code: what its user has not installed or registered, is refused.

A scheme of one's own, in a file of one's own::

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

Other roundings (3 of 4 weights nonzero, scales per row) are a rule. A scheme whose layer computes something else than a
product of codes (a Hadamard transform in front of it, a bias made from small weights) also names a `layer`, a subclass
of BitLinear; a latent model folder holds it, and formats of codes refuse it.

This module imports no torch: the native engine asks for a scheme before torch is imported, if it ever is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from bitnet_lit.errors import UserError
from bitnet_lit.quant.activations import AbsMax, ActivationRule
from bitnet_lit.quant.weights import AbsMean, AbsMedian, Granularity, PerGroup, PerRow, PerTensor, Sign, WeightRule

if TYPE_CHECKING:
    from bitnet_lit.quant.bit_linear import BitLinear

ENTRY_POINTS = "bitnet_lit.schemes"
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
        """Name and settings as plain data; `scheme_named` takes them."""
        return {"name": self.name, **asdict(self)}

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in asdict(self).items())
        return f"{self.name} ({settings})" if settings else self.name


S = TypeVar("S", bound=type[Scheme])
_registered: dict[str, type[Scheme]] = {}


def register(cls: S) -> S:
    """Make a scheme known by its name; usable as a decorator.

    Raises:
        UserError: not a scheme, or its name is taken by another class.
    """
    if not (isinstance(cls, type) and issubclass(cls, Scheme) and isinstance(getattr(cls, "name", None), str)):
        raise UserError(f"{cls!r} is no quantization scheme: derive it from bitnet_lit.quant.Scheme and give it a name")
    taken = _registered.get(cls.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UserError(
            f"quantization scheme {cls.name}: {taken.__module__}.{taken.__qualname__} has this name: choose another one"
        )
    _registered[cls.name] = cls
    return cls


def _check_bits(activation_bits: int) -> None:
    if not 2 <= activation_bits <= 8:
        raise UserError(f"quant.activation_bits={activation_bits}: must lie in 2..8 (codes are stored as int8)")


@register
@dataclass(frozen=True)
class B158(Scheme):
    """BitNet b1.58: ternary weights, one scale for the matrix, activations of 8 bits or less."""

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

    @property
    def weights(self) -> WeightRule:
        """Nearest of -1, 0, +1."""
        rule = AbsMedian if self.weight_scale == "absmedian" else AbsMean
        return rule(self._granularity())

    @property
    def activations(self) -> ActivationRule:
        """By each token's largest magnitude."""
        return AbsMax(self.activation_bits)


@register
@dataclass(frozen=True)
class B158Row(B158):
    """b1.58 with a scale for each row: an output of small weights keeps codes that differ from 0."""

    name = "b158_row"
    title = "ternary weights (b1.58: -1, 0, +1), a scale for each row"

    def _granularity(self) -> Granularity:
        return PerRow()


@register
@dataclass(frozen=True)
class B158Group(B158):
    """b1.58 with a scale for each group of inputs, as GPTQ, llama.cpp's blocks and torchao's PerGroup have it."""

    name = "b158_group"
    title = "ternary weights (b1.58: -1, 0, +1), scales for groups of inputs"
    group_size: int = 128
    """Inputs that share a scale; it must divide every projection's in_features. 64 and 128 are usual."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise UserError(f"quant.settings.group_size={self.group_size}: must be 2 or more")

    def _granularity(self) -> Granularity:
        return PerGroup(self.group_size)


@register
@dataclass(frozen=True)
class B1(Scheme):
    """BitNet: binary weights around their mean, activations of 8 bits or less."""

    name = "b1"
    title = "binary weights (b1: -1, +1)"
    activation_bits: int = 8

    def __post_init__(self) -> None:
        _check_bits(self.activation_bits)

    @property
    def weights(self) -> WeightRule:
        """The sign of the distance from the mean."""
        return Sign()

    @property
    def activations(self) -> ActivationRule:
        """By each token's largest magnitude."""
        return AbsMax(self.activation_bits)


@register
@dataclass(frozen=True)
class Dense(Scheme):
    """The dense twin: the same network, nothing rounded."""

    name = "none"
    title = "dense weights"
    ignores = ("weight_scale", "activation_bits")  # so that a sweep sets them for a BitNet and its twin alike

    @property
    def weights(self) -> None:
        """None."""


@cache
def _installed() -> dict[str, Any]:
    """Entry points of installed packages by their names; nothing is imported yet."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def is_known(name: str) -> bool:
    """Whether a scheme of this name is built in, registered or installed."""
    return name in _registered or name in _installed()


def scheme_class(name: str) -> type[Scheme]:
    """The class of a scheme.

    Raises:
        UserError: a name that is neither built in nor registered nor installed.
    """
    if name not in _registered and name in _installed():
        register(_installed()[name].load())
    if not is_known(name):
        known = ", ".join(dict.fromkeys([*_registered, *_installed()]))
        raise UserError(
            f"quant.name={name}: must be one of {known}; name the class of your own scheme: "
            "quant._target_=<module>.<class> to train, schemes=[<module>.<class>] to open a model, "
            "bitnet_lit.quant.register in Python"
        )
    return _registered[name]


def imported_scheme(target: str, given: str) -> type[Scheme]:
    """Import and register the class that a user names, <module>.<class>.

    Args:
        given: how it was named, for the error.

    Raises:
        UserError: no such module or class, or one that is no scheme.
    """
    try:
        found: type[Scheme] = resolve_name(target)  # `register` checks that it is one
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{given}: cannot be imported ({type(error).__name__}: {error}): give <module>.<class> of "
            "a module in this folder, on PYTHONPATH, or of an installed package"
        ) from None
    return register(found)


_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def make_scheme(cls: type[Scheme], settings: Mapping[str, Any]) -> Scheme:
    """A scheme of `cls`.

    Raises:
        UserError: a setting that it does not have, or a value that does not fit.
    """
    # An annotation is a text where its module postpones them, and the type itself elsewhere.
    kinds = {field.name: getattr(field.type, "__name__", str(field.type)) for field in fields(cls)}
    for key, value in settings.items():
        if key not in kinds:
            has = ", ".join(kinds) or "none"
            raise UserError(f"quant={cls.name}: has no setting {key} (={value!r}), its settings are: {has}")
        allowed = _TYPES.get(kinds[key])
        if allowed and (type(value) not in allowed or (type(value) is float and not math.isfinite(value))):
            raise UserError(f"quant={cls.name}: {key}={value!r} must be of type {kinds[key]}")
    return cls(**settings)


def scheme_named(name: str, settings: Mapping[str, Any] | None = None) -> Scheme:
    """A scheme by its name and settings, as `Scheme.describe` gives them.

    Raises:
        UserError: an unknown name, a setting that it does not have, or a value that does not fit.
    """
    return make_scheme(scheme_class(name), settings or {})


def is_skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether a layer stays dense: an entry of `skip` is its name, or the last parts of its dotted name."""
    return any(name == entry or name.endswith("." + entry) for entry in skip)
