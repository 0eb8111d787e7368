"""The bytes of a model's weights, from the config of its run.

A quantized projection takes the information of its codes and its share of the scales, as `model/accounting.py` counts.
Everything else (embeddings, norms, the dense twin) takes `dense_bits` for each weight: 16 as models are shipped, 32 as
they are trained.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.errors import one_line
from bitnet_lit.model.accounting import account

_DAMAGED = (TypeError, ValueError, AttributeError, KeyError, ArithmeticError)
"""A config raises one of these if its values are of other types, or are sizes that nothing has."""


@dataclass(frozen=True)
class WeightSizes:
    """The sizes of a model's weights.

    Attributes:
        projections: parameters of the seven projections of all layers.
        bits_per_weight: mean bits of a projection weight.
        num_bytes: bytes of all weights.
    """

    parameters: int
    projections: int
    bits_per_weight: float
    num_bytes: float


def quant_config(config: dict[str, Any]) -> QuantConfig | None:
    """Return the scheme of a run; None where none is known here. Nothing that the config names is imported."""
    values = config.get("quant")
    if not isinstance(values, dict):
        return None
    known = {field.name for field in fields(QuantConfig)} - {"_target_", "kernel", "grad"}
    try:
        return QuantConfig(**{key: value for key, value in values.items() if key in known})
    except _DAMAGED:
        return None


def unknown_scheme(config: dict[str, Any]) -> str | None:
    """Return the class of a scheme of the user's own that a run names and that is not known here, or None."""
    quant = config.get("quant")
    target = quant.get("_target_") if isinstance(quant, dict) and quant_config(config) is None else None
    return one_line(target, 200) if isinstance(target, str) else None


def is_dense(config: dict[str, Any]) -> bool:
    """Return whether a run trained a dense model, one whose scheme rounds nothing."""
    quant = quant_config(config)
    return quant is not None and not quant.scheme.quantizes


def weight_sizes(config: dict[str, Any], dense_bits: int) -> WeightSizes | None:
    """Return the sizes of a run's model; None for a network or a scheme that is not known here.

    Args:
        dense_bits: bits of a weight that is not quantized.
    """
    quant, values = quant_config(config), config.get("model")
    if quant is None or not isinstance(values, dict) or "_target_" in values:
        return None
    known = {field.name for field in fields(ModelConfig)}
    try:
        counted = account(
            ModelConfig(**{key: value for key, value in values.items() if key in known}), quant, dense_bits=dense_bits
        )
    except _DAMAGED:
        return None
    bits = counted.projections * counted.bits_per_weight + (counted.embedding + counted.norms) * dense_bits
    return WeightSizes(counted.parameters, counted.projections, counted.bits_per_weight, bits / 8)
