"""A format or an engine lists what networks it supports: fields of `ModelConfig`, with the values that they may have.

The list is an allow-list. A field that is not in it must have its default. So a network with a part that is newer than
the list is refused, with the name of the field, and is never written or computed without that part.

::

    HOLDS = {**SIZES, "hidden_act": Only("silu", remedy="run.c computes silu: take hidden_act=silu")}
    refused_fields(config, HOLDS)   # ["model.hidden_act=relu2: run.c computes silu: ...", "model.qk_norm=True: ..."]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from bitnet_lit.config.checks import written
from bitnet_lit.config.network import ModelConfig


@dataclass(frozen=True)
class Only:
    """Only says that a field must have one value. The remedy says why, and what the user can do."""

    value: Any
    remedy: str


@dataclass(frozen=True)
class AnyValue:
    """AnyValue says that a field may have any value."""


Held = Mapping[str, Only | AnyValue]
ANY = AnyValue()
SIZES: Held = dict.fromkeys(
    (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "vocab_size", "max_position_embeddings"),
    ),
    ANY,
)
"""The fields that only change the sizes of tensors; all of them may have any value."""


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def network_values(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that say what a network is, with their values.

    The name of the size is left out, and so are the fields that say how it is trained.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {key: value for key, value in values.items() if key != "name" and key not in config.TRAINING}


def refused_fields(config: ModelConfig, held: Held, keys_of: str = "model.", remedy: str = "") -> list[str]:
    """Return why a network is not supported, one line for each refused field. The list is empty if it is supported.

    Args:
        held: the supported fields; a field that is not in it must have its default.
        keys_of: the prefix of a field's name in the lines.
        remedy: what the user can take instead, for a field that is not in `held`; beside the field's default.
    """
    defaults = {field.name: _default(field) for field in fields(config)}
    found = []
    for key, value in network_values(config).items():
        unknown = "this part of a network is not known there"
        if remedy:
            unknown += f": take {remedy}, or train with {keys_of}{key}={written(defaults[key])}"
        allowed = held.get(key, Only(defaults[key], unknown))
        if isinstance(allowed, Only) and value != allowed.value:
            found.append(f"{keys_of}{key}={written(value)}: {allowed.remedy}")
    return found
