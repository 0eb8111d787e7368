"""A folder of shards is opened here, and everything that can be checked before the first step is checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_lit.data.fetch import is_url
from bitnet_lit.data.remote_folder import Known, open_remote
from bitnet_lit.data.shard_cache import ShardCache
from bitnet_lit.data.shard_directory import ShardDirectory, agreed_vocab_size
from bitnet_lit.data.shard_folder import (
    META_NAME,
    dtype_for,
    find_shard_tokenizer,
    find_shards,
    read_meta,
    vocab_size_in_name,
)
from bitnet_lit.data.tokenizers import open_tokenizer
from bitnet_lit.errors import UserError, read_errors
from bitnet_lit.files.regular_file import open_regular

# All token ids are checked in folders up to this size; in larger ones, those in some blocks of each shard, its two ends
# among them. That finds a wrong dtype or vocabulary at once, and reads a megabyte per shard instead of 30 GB. An id
# that it does not see is refused when it is read.
FULL_CHECK_BYTES = 256 * 2**20
CHECK_BLOCKS, CHECK_BLOCK_TOKENS = 16, 2**15
CHECK_AT_ONCE_TOKENS = 2**22


def _write_shards(folder: Path) -> str:
    """Return the remedy for a path that is no folder of shards. The demo corpus is written to data/demo by default."""
    if folder.is_file() and folder.suffix == ".bin":
        return f"give the folder of the shards, {folder.parent}"
    if folder.is_file():
        return f"if it is text, write shards of it with python -m bitnet_lit.prepare source={folder} out=<folder>"
    source = "demo" if folder.parts[-2:] == ("data", "demo") else "<text> out=<folder>"
    return f"give another folder, or write shards with python -m bitnet_lit.prepare source={source}"


def _shard_paths(folder: Path, meta: dict[str, Any], key: str) -> list[Path]:
    """Return the paths of the shards in order; refuse a folder that does not hold just those that meta.json names."""
    with read_errors(f"{key}={folder}", "check its permissions"):
        paths = find_shards(folder)
    if not paths:
        raise UserError(f"{key}={folder}: no .bin shards in it: {_write_shards(folder)}")
    if "shards" in meta:
        names = {path.name for path in paths}
        if lost := set(meta["shards"]) - names:
            raise UserError(f"{folder}: {min(lost)} is missing: run the same python -m bitnet_lit.prepare again")
        if unknown := names - set(meta["shards"]):
            raise UserError(f"{folder}: {META_NAME} knows no {min(unknown)}: take that file away")
    return paths


def _checked_size(path: Path, dtype: np.dtype, vocab_size: int, meta: dict[str, Any], whole: bool) -> int:
    """Check the size and the ids of a shard, and return the number of its tokens.

    Args:
        whole: check all ids; otherwise those in some blocks (see FULL_CHECK_BYTES).
    """
    with open_regular(path, "check the file and its permissions") as file:
        size = os.fstat(file.fileno()).st_size
        if size % dtype.itemsize or not size:
            raise UserError(
                f"{path}: {size} bytes are not a whole number of {dtype} tokens: the file is damaged, or not a shard"
            )
        tokens = size // dtype.itemsize
        noted = meta.get("shards", {}).get(path.name)
        if noted and noted["tokens"] != tokens:
            raise UserError(f"{path}: {tokens} tokens, but {META_NAME} says {noted['tokens']}: prepare it again")
        if whole or tokens <= CHECK_BLOCKS * CHECK_BLOCK_TOKENS:
            starts, length = list(range(0, tokens, CHECK_AT_ONCE_TOKENS)), CHECK_AT_ONCE_TOKENS
        else:
            starts = np.linspace(0, tokens - CHECK_BLOCK_TOKENS, CHECK_BLOCKS).astype(np.int64).tolist()
            length = CHECK_BLOCK_TOKENS
        largest = 0
        with read_errors(path, "check the disk, or prepare it again"):
            for start in starts:
                file.seek(start * dtype.itemsize)
                block = np.frombuffer(file.read(min(length, tokens - start) * dtype.itemsize), dtype)
                largest = max(largest, int(block.max(initial=0)))
        if largest >= vocab_size:
            raise UserError(
                f"{path}: token id {largest} lies beyond the vocabulary of {vocab_size}: the shards and the "
                "tokenizer do not belong together (data.tokenizer), or the file is not a shard"
            )
    return tokens


def open_shards(
    folder: Path | str,
    tokenizer: Path | None = None,
    key: str = "data.dir",
    cache: ShardCache | None = None,
    known: Known | None = None,
) -> ShardDirectory:
    """Open a folder of shards and check it.

    Args:
        folder: its path, or a URL (see `remote_folder`).
        tokenizer: the tokenizer's file, for a folder that comes without one.
        key: the key of the command that names the folder, for errors.
        cache: keeps the shards of a remote folder. None: the user's cache, up to 20 GiB.
        known: which remote folders may be read from the cache alone (see `open_remote`).

    Raises:
        UserError: there is no such folder, there are no shards in it, a file is not a shard, or the tokenizer is not
            the one that wrote them; one line.
        DataError: a remote folder cannot be reached; one line.
    """
    if is_url(folder):
        return open_remote(str(folder), tokenizer, key, cache or ShardCache.default(), known)
    folder = Path(folder)
    if not os.path.isdir(folder):
        what = "not a folder" if os.path.lexists(folder) else "no such folder"
        raise UserError(f"{key}={folder}: {what}: {_write_shards(folder)}")
    meta = read_meta(folder)
    if not meta.get("complete", True):
        raise UserError(f"{folder}: not finished: run the same python -m bitnet_lit.prepare again")
    paths = _shard_paths(folder, meta, key)
    tokenizer_path = tokenizer or find_shard_tokenizer(folder)
    opened = open_tokenizer(tokenizer_path) if tokenizer_path else None
    vocab_size = agreed_vocab_size(str(folder), vocab_size_in_name(folder), meta, opened)
    dtype = np.dtype(meta["dtype"]) if meta else dtype_for(vocab_size)
    try:
        whole = sum(path.stat().st_size for path in paths) <= FULL_CHECK_BYTES
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}): prepare it again") from None
    sizes: dict[Path | str, int] = {path: _checked_size(path, dtype, vocab_size, meta, whole) for path in paths}
    return ShardDirectory(folder, sizes, dtype, vocab_size, opened, meta)
