"""A model's config.json as others may have written it: read once, and checked before anything is built from it.

Ours and that of `transformers` share most keys. `OURS` and `THEIRS` name every key that is read here, with its type
and the range beyond which no model lies: what a damaged file says must not ask for memory, nor end in a traceback.
Other keys are left alone; `null` where `transformers` writes it counts as absent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitnet_lit.errors import UserError
from bitnet_lit.foreign_json import (
    MAX_BYTES,
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
    parse_json,
)
from bitnet_lit.regular_file import read_regular

CONFIG_NAME = "config.json"
LARGEST_SIZE = 2**24  # of any axis
LARGEST_NUMBER = 2.0**100  # a float32
FORMAT_VERSION = 1  # of what stands under "bitnet_lit"

SIZE = Integer(1, LARGEST_SIZE)
POSITIVE = Number(0, LARGEST_NUMBER, exclusive_low=True)
SIZES: dict[str, Shape] = {
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "max_position_embeddings": SIZE,
    "rms_norm_eps": POSITIVE,
    "hidden_act": Text(),
}
OPTIONAL: dict[str, Shape] = {
    "num_key_value_heads": OrNull(SIZE),
    "head_dim": OrNull(SIZE),
    "rope_theta": OrNull(POSITIVE),
    "tie_word_embeddings": OrNull(Flag()),
    "initializer_range": OrNull(POSITIVE),
    "tokenizer_sha256": OrNull(Text()),
}
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
    }
)
OURS = Record(
    {
        "vocab_size": SIZE,
        "bitnet_lit": Record(
            {"quant": QUANT},
            {
                "format_version": Integer(1, 2**31),
                "name": Text(),
                "sub_norm": Flag(),
                "qkv_bias": Flag(),
                "qk_norm": Flag(),
                "dropout": Number(0, 1),
                "info": INFO,
            },
        ),
    },
    {**SIZES, **OPTIONAL},
)
ROPE = OrNull(Record(optional={"rope_type": Text(), "type": Text(), "rope_theta": OrNull(POSITIVE)}))
THEIRS = Record(
    {"model_type": Text(), "vocab_size": SIZE, **SIZES},
    {
        **OPTIONAL,
        "rope_parameters": ROPE,
        "rope_scaling": ROPE,
        "sliding_window": OrNull(Integer(0, 2**40)),
        "use_sliding_window": OrNull(Flag()),
        "attention_bias": OrNull(Flag()),
        "mlp_bias": OrNull(Flag()),
        "quantization_config": OrNull(
            Record(
                optional={
                    "quant_method": OrNull(Text()),
                    "use_rms_norm": OrNull(Flag()),
                    "modules_to_not_convert": OrNull(ListOf(Text())),
                    "linear_class": Text(),
                    "quantization_mode": Text(),
                }
            )
        ),
    },
)


def read_raw_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands: any object.

    Raises:
        UserError: missing, unreadable, or no JSON object.
    """
    path = folder / CONFIG_NAME
    content = read_regular(path, "is this a model folder?", MAX_BYTES)
    raw: dict[str, Any] = parse_json(content, f"{path}: not a config.json", Record(), "copy it again")
    return raw


def check_config(path: Path, raw: dict[str, Any], shape: Shape) -> None:
    """Refuse a config that does not have a shape of this module.

    Raises:
        UserError: the first key that does not, and its value.
    """
    try:
        shape.check(raw, "")
    except Mismatch as error:
        raise UserError(f"{path}: not a config.json of a model: {error}: copy it again") from None
