"""A model's config.json may come from somebody else, so it is checked before anything is built from it.

Our config.json and that of `transformers` share most keys. `our_shape` and `their_shape` say what each key that is read
may hold. For the fields of a network this follows from the types and ranges of `ModelConfig`. So a damaged file can
neither request too much memory nor cause a traceback. Other keys are not checked. Where `transformers` writes `null`,
it means that the key is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from bitnet_lit.checkpoints.file_names import CONFIG_NAME
from bitnet_lit.config import ModelConfig
from bitnet_lit.config.checks import Range
from bitnet_lit.errors import UserError
from bitnet_lit.files.foreign_json import MAX_BYTES, parse_json
from bitnet_lit.files.json_shapes import (
    Anything,
    Flag,
    Integer,
    ListOf,
    MapOf,
    Mismatch,
    Number,
    OrNull,
    Record,
    Shape,
    Text,
)
from bitnet_lit.files.regular_file import read_regular

LARGEST_SIZE = 2**24  # of any axis of a tensor
LARGEST_NUMBER = 2.0**100  # well within float32
SIZE = Integer(1, LARGEST_SIZE)
FORMAT_VERSION = 1  # of the values under "bitnet_lit"
NETWORK = "network"  # a key under "bitnet_lit" for a user's own class and its arguments

REQUIRED = (  # the fields of a network that every config.json has
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("rms_norm_eps", "hidden_act"),
)
QUANT = Record(
    {"name": Text(), "skip": ListOf(Text())},
    {
        "weight_scale": Text(),
        "activation_bits": Integer(1, 64),
        "lambda_warmup_steps": Integer(0, 2**63),
        "lambda_warmup_shape": Text(),
    },
)
INFO = Record(
    optional={
        "data": Text(),
        "data_dir": OrNull(Text()),  # of folders of earlier versions
        "sequence_length": OrNull(SIZE),
        "recipe": MapOf(Anything()),
        "metrics": MapOf(Anything()),
        "warning": Text(),
    }
)
CUSTOM = Record(
    {"bitnet_lit": Record({"quant": QUANT, NETWORK: Record({"_target_": Text()})}, {"info": INFO})},
    {"tokenizer_sha256": OrNull(Text())},
)
"""The config.json of a network of the user's own, whose class checks its arguments itself."""


@cache
def field_shapes(config: type[ModelConfig]) -> dict[str, Shape]:
    """Return the shape of each field of a network, from the field's type and range."""
    kinds = get_type_hints(config)
    return {each.name: _shape(kinds[each.name], config.RANGES.get(each.name)) for each in fields(config)}


def _shape(kind: Any, allowed: Range | None) -> Shape:
    if type(None) in (options := get_args(kind)):
        return OrNull(_shape(options[0], allowed))
    if kind is bool:
        return Flag()
    if kind is int:
        return (
            Integer(int(allowed.least), min(int(allowed.most), LARGEST_SIZE)) if allowed else Integer(0, LARGEST_SIZE)
        )
    if kind is float:
        return Number(allowed.least, allowed.most) if allowed else Number(-LARGEST_NUMBER, LARGEST_NUMBER)
    return Text() if kind is str else Anything()


def our_shape(ours: Iterable[str]) -> Record:
    """Return the shape of a config.json that this project wrote.

    Args:
        ours: the fields of the network under "bitnet_lit"; the others have Hugging Face's names at the top level.
    """
    shapes = field_shapes(ModelConfig)
    optional: dict[str, Shape] = {"format_version": Integer(1, 2**31), "info": INFO}
    inside = Record({"quant": QUANT}, {**optional, **{key: shapes[key] for key in ours}})
    return Record({"vocab_size": SIZE, "bitnet_lit": inside, **_required(shapes)}, _optional(shapes))


def their_shape() -> Record:
    """Return the shape of a config.json that `transformers` wrote."""
    shapes = field_shapes(ModelConfig)
    rope = OrNull(
        Record(optional={"rope_type": Text(), "type": Text(), "rope_theta": OrNull(shapes["rope_theta"])}),
    )
    quantization: dict[str, Shape] = {
        "quant_method": OrNull(Text()),
        "use_rms_norm": OrNull(Flag()),
        "modules_to_not_convert": OrNull(ListOf(Text())),
        "linear_class": Text(),
        "quantization_mode": Text(),
    }
    optional: dict[str, Shape] = {
        "rope_parameters": rope,
        "rope_scaling": rope,
        "sliding_window": OrNull(Integer(0, 2**40)),
        "use_sliding_window": OrNull(Flag()),
        "attention_bias": OrNull(Flag()),
        "mlp_bias": OrNull(Flag()),
        "quantization_config": OrNull(Record(optional=quantization)),
    }
    return Record({"model_type": Text(), "vocab_size": SIZE, **_required(shapes)}, {**_optional(shapes), **optional})


def _required(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {key: shapes[key] for key in REQUIRED}


def _optional(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the shapes of fields that a config.json may leave out or set to null, as `transformers` does."""
    keys = ("num_key_value_heads", "head_dim", "rope_theta", "tie_word_embeddings", "initializer_range")
    return {**{key: OrNull(shapes[key]) for key in keys}, "tokenizer_sha256": OrNull(Text())}


def network_in(raw: dict[str, Any]) -> str | None:
    """Return the name of the user's own class in a config.json; None where the network is this project's."""
    ours = raw.get("bitnet_lit")
    network = ours.get(NETWORK) if isinstance(ours, dict) else None
    return str(network.get("_target_")) if isinstance(network, dict) else None


def read_raw_config(folder: Path) -> dict[str, Any]:
    """Read config.json without checking its keys.

    Raises:
        UserError: the file is missing, cannot be read, or is not a JSON object.
    """
    path = folder / CONFIG_NAME
    content = read_regular(path, "is this a model folder?", MAX_BYTES)
    raw: dict[str, Any] = parse_json(content, f"{path}: not a config.json", Record(), "copy it again")
    return raw


def check_config(path: Path, raw: dict[str, Any], shape: Shape) -> None:
    """Refuse a config that does not have the given shape.

    Raises:
        UserError: a key does not fit; the message names the first one and its value.
    """
    try:
        shape.check(raw, "")
    except Mismatch as error:
        raise UserError(f"{path}: not a config.json of a model: {error}: copy it again") from None
