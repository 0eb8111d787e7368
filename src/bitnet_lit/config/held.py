"""Which networks a format or an engine can hold: a list of the fields that it knows, with the values it can take.

The list is an allow-list. A field of `ModelConfig` that is not in it must have its default: a network with a part that
the list's author did not know of is refused by the field's name, and never written or computed without that part.

::

    HOLDS = {**SIZES, "hidden_act": Only("silu", remedy="run.c computes silu: take hidden_act=silu")}
    refused_fields(config, HOLDS)   # ["model.hidden_act=relu2: run.c computes silu: ...", "model.qk_norm=True: ..."]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from bitnet_lit.config.network import ModelConfig


@dataclass(frozen=True)
class Only:
    """A field that can be held at one value; the remedy says why, and what to do."""

    value: Any
    remedy: str


@dataclass(frozen=True)
class AnyValue:
    """A field that can be held at every value."""


Held = Mapping[str, Only | AnyValue]
ANY = AnyValue()
SIZES: Held = dict.fromkeys(
    (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "vocab_size", "max_position_embeddings"),
    ),
    ANY,
)
"""Fields that only change sizes."""


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def network_values(config: ModelConfig) -> dict[str, Any]:
    """The fields that say what a network is, with their values; not its name, nor how it is trained."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {key: value for key, value in values.items() if key != "name" and key not in config.TRAINING}


def refused_fields(config: ModelConfig, held: Held, keys_of: str = "model.") -> list[str]:
    """Why a network cannot be held, one line for each field; empty where it can.

    Args:
        keys_of: what stands before a field's name.
    """
    defaults = {field.name: _default(field) for field in fields(config)}
    found = []
    for key, value in network_values(config).items():
        allowed = held.get(key, Only(defaults[key], "this part of a network is not known there"))
        if isinstance(allowed, Only) and value != allowed.value:
            found.append(f"{keys_of}{key}={value}: {allowed.remedy}")
    return found
