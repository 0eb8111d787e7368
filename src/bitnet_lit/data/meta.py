"""meta.json: what a folder of shards says about itself, and the one place that knows its form.

`prepare` writes it before the first shard and again after each. Everything that opens the folder reads it through
`read_meta`, so a file that is damaged, or that something else wrote, is refused by all of them in the same line.

    dtype, vocab_size           how ids are stored, and the number that they lie below
    bos_id, eos_id              -1 where the tokenizer has none
    tokenizer_sha256            of the tokenizer's file
    tokenizer_origin, source    where tokenizer and text came from: another `prepare` call must say the same to go on
    complete                    whether every shard is there
    shards                      name -> tokens, stories, text_bytes, fingerprint of the text it was made from; and
                                what was read for it: bytes_in, documents, empty, carriage_returns

A folder that somebody else wrote may hold a meta.json with `dtype` and `vocab_size` alone; llama2.c's have none.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_lit.atomic import atomic_file
from bitnet_lit.errors import UserError
from bitnet_lit.foreign_json import SHA256, Choice, Flag, Integer, MapOf, OrNull, Record, Text, read_json

META_NAME = "meta.json"
META_VERSION = 1
MAX_META_BYTES = 2**25  # 300 bytes a shard of 64 MB of text: room for 6 TB of text

_COUNT = Integer(0, 2**63 - 1)
_ID = Integer(-1, 2**31 - 1)
_SHARD = Record(
    {"tokens": _COUNT, "stories": _COUNT, "text_bytes": _COUNT, "fingerprint": Text()},
    optional={"bytes_in": _COUNT, "documents": _COUNT, "empty": _COUNT, "carriage_returns": _COUNT},
)
META = Record(
    {"dtype": Choice("uint16", "uint32"), "vocab_size": Integer(1, 2**31 - 1)},
    optional={
        "format_version": Integer(META_VERSION, META_VERSION),
        "bos_id": _ID,
        "eos_id": _ID,
        "tokenizer_sha256": OrNull(SHA256),
        "tokenizer_origin": Text(),
        "source": Text(),
        "complete": Flag(),
        "shards": MapOf(_SHARD),
    },
)


def dtype_for(vocab_size: int) -> np.dtype:
    """uint16, or uint32 for vocabularies that do not fit."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def read_meta(folder: Path, remedy: str = "prepare the folder again") -> dict[str, Any]:
    """The checked contents of a folder's meta.json; empty where there is none.

    Raises:
        UserError: a file that cannot be read, or that has another form; one line.
    """
    path = folder / META_NAME
    if not os.path.lexists(path):
        return {}
    meta: dict[str, Any] = read_json(path, META, remedy, MAX_META_BYTES)
    if dtype_for(meta["vocab_size"]).itemsize > np.dtype(meta["dtype"]).itemsize:
        raise UserError(f"{path}: {meta['dtype']} cannot hold the ids of {meta['vocab_size']} tokens: {remedy}")
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Replace a folder's meta.json."""
    with atomic_file(folder / META_NAME) as temporary:
        temporary.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def is_complete(folder: Path) -> bool:
    """Whether `prepare` has finished the folder."""
    try:
        return bool(read_meta(folder).get("complete"))
    except UserError:
        return False
