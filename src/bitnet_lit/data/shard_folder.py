"""This module knows which files lie in a shard folder and what its meta.json says. No other module knows their names.

A folder that `prepare` wrote holds

    meta.json                 what the folder says about itself
    data00.bin, data01.bin    token ids, uint16 or uint32 in little-endian order: for each story a BOS and its tokens
    tokenizer.model           or tokenizer.json and tokenizer_config.json

Two kinds of llama2.c's folders are read, too: `TinyStories_all_data`, where the shards lie beside the .json files they
were made from, in Llama 2's vocabulary; and `tokN`, shards in a vocabulary of N entries with `tokN.model` beside the
folder. Neither has a meta.json.

`prepare` writes meta.json before the first shard, and again while it writes shards:

    dtype, vocab_size           how ids are stored, and the number that all of them are below
    bos_id, eos_id              -1 where the tokenizer has none
    tokenizer_sha256            the hash of the tokenizer's file
    tokenizer_origin, source    where tokenizer and text came from: `prepare` never continues a folder with others
    complete                    whether all shards are there
    tokenizer_files             by name: the sha256 of each file of the tokenizer
    shards                      by name: tokens, stories, text_bytes and the fingerprint of the text; and what was read:
                                bytes_in, documents, empty, carriage_returns; and the content of the file: its sha256,
                                and the digest that identifies it in a run

A folder that somebody else wrote may hold a meta.json with `dtype` and `vocab_size` alone. A folder behind a URL needs
all of it: meta.json is its listing, and says whether a shard has come whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_lit.data.tokenizers import FILE_NAMES, find_tokenizer
from bitnet_lit.data.tokenizers.tokenizer_json import JsonTokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.files.foreign_json import parse_json
from bitnet_lit.files.json_shapes import SHA256, Choice, Flag, Integer, MapOf, OrNull, Record, Text
from bitnet_lit.files.regular_file import read_regular

META_NAME = "meta.json"
OWN_JSON_NAMES = (META_NAME, *JsonTokenizer.file_names)
"""Files of a shard folder that are JSON, but not text to train on."""
META_VERSION = 1
MAX_META_BYTES = 2**26  # 100,000 shards of about 500 bytes: 6 TB of text
DIGEST_BLOCKS, DIGEST_BLOCK_BYTES = 16, 2**16

_COUNT = Integer(0, 2**63 - 1)
_ID = Integer(-1, 2**31 - 1)
_SHARD = Record(
    {"tokens": _COUNT, "stories": _COUNT, "text_bytes": _COUNT, "fingerprint": Text()},
    optional={
        "bytes_in": _COUNT,
        "documents": _COUNT,
        "empty": _COUNT,
        "carriage_returns": _COUNT,
        "sha256": SHA256,
        "digest": Text(),
    },
)
META = Record(
    {"dtype": Choice("uint16", "uint32"), "vocab_size": Integer(1, 2**31 - 1)},
    optional={
        "format_version": Integer(META_VERSION, META_VERSION),
        "bos_id": _ID,
        "eos_id": _ID,
        "tokenizer_sha256": OrNull(SHA256),
        "tokenizer_files": MapOf(SHA256),
        "tokenizer_origin": Text(),
        "source": Text(),
        "complete": Flag(),
        "shards": MapOf(_SHARD),
    },
)


def shard_path(folder: Path, name: str) -> Path:
    """Return the path of the shard `name`, such as data00."""
    return folder / f"{name}.bin"


def find_shards(folder: Path) -> list[Path]:
    """Return the paths of all shards in order.

    Raises:
        OSError: the folder cannot be listed.
    """
    return sorted(path for path in folder.iterdir() if path.suffix == ".bin" and not path.name.startswith("."))


def check_alone(folder: Path, text: Iterable[Path]) -> None:
    """Refuse to begin a folder of shards among other files: it is copied, moved and deleted as a whole.

    A tokenizer and hidden files may lie there before. Where the text lies in the folder, as in llama2.c's, everything
    may.

    Args:
        text: the files that shards are made of.

    Raises:
        UserError: something else lies there.
    """
    if (folder / META_NAME).exists():
        return
    foreign = [name for name in sorted(os.listdir(folder)) if not name.startswith(".") and name not in FILE_NAMES]
    inside = tuple(os.path.join(place, "") for place in (os.path.abspath(folder), os.path.realpath(folder)))
    if foreign and not any(
        os.path.abspath(path).startswith(inside) or os.path.realpath(path).startswith(inside) for path in text
    ):
        raise UserError(
            f"out={folder}: holds {foreign[0]}, which prepare did not write: give a folder for the shards alone, such "
            f"as out={folder / 'shards'}"
        )


def find_shard_tokenizer(folder: Path) -> Path | None:
    """Return the tokenizer's file: in the folder, or beside it as llama2.c puts it; None where there is none."""
    beside = folder.parent / f"{folder.name}.model"
    return find_tokenizer(folder) or (beside if beside.is_file() else find_tokenizer(folder.parent))


def vocab_size_in_name(folder: Path) -> int | None:
    """Return N of llama2.c's folder `tokN`; None for another name."""
    named = re.fullmatch(r"tok(\d{1,9})", folder.name)
    return int(named.group(1)) or None if named else None


def dtype_for(vocab_size: int) -> np.dtype:
    """Return how ids are stored: uint16, or uint32 for a vocabulary of more than 65,536 entries."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def read_meta(folder: Path, remedy: str = "prepare the folder again") -> dict[str, Any]:
    """Return the checked contents of a folder's meta.json; empty where there is none.

    Args:
        remedy: what the user can do, for the end of an error's line.

    Raises:
        UserError: the file cannot be read, or has another form; one line.
    """
    path = folder / META_NAME
    if not os.path.lexists(path):
        return {}
    return parse_meta(read_regular(path, remedy, MAX_META_BYTES), path, remedy)


def parse_meta(content: bytes, where: Path | str, remedy: str) -> dict[str, Any]:
    """Return the checked contents of a meta.json.

    Args:
        where: the start of an error's line, usually its path.
        remedy: what the user can do, for the end of an error's line.

    Raises:
        UserError: it has another form; one line.
    """
    meta: dict[str, Any] = parse_json(content, where, META, remedy)
    if dtype_for(meta["vocab_size"]).itemsize > np.dtype(meta["dtype"]).itemsize:
        raise UserError(f"{where}: {meta['dtype']} cannot hold the ids of {meta['vocab_size']} tokens: {remedy}")
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Replace a folder's meta.json."""
    with atomic_file(folder / META_NAME) as temporary:
        temporary.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def shard_digest(path: Path) -> str:
    """Return the size and a hash of some blocks of a shard: they differ for another text or tokenizer.

    At most a megabyte is read.
    """
    size = path.stat().st_size
    last = max(0, size - DIGEST_BLOCK_BYTES)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in range(DIGEST_BLOCKS):
            file.seek(last * block // (DIGEST_BLOCKS - 1))
            digest.update(file.read(DIGEST_BLOCK_BYTES))
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def is_complete(folder: Path) -> bool:
    """Return whether `prepare` has finished the folder."""
    try:
        return bool(read_meta(folder).get("complete"))
    except UserError:
        return False
