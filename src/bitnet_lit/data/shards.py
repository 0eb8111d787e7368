"""A folder of shards is opened here, and everything that can be checked before the first step is checked.

Shard 0 is for validation, the rest for training, as in llama2.c. A single shard is divided: its first tenth, cut on a
sequence border and at least one sequence long, is for validation.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_lit.data.shard_folder import (
    META_NAME,
    dtype_for,
    find_shard_tokenizer,
    find_shards,
    read_meta,
    vocab_size_in_name,
)
from bitnet_lit.data.token_split import Piece, TokenSplit
from bitnet_lit.data.tokenizers import Tokenizer, open_tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.regular_file import open_regular

LLAMA2_VOCAB_SIZE = 32000
VALIDATION_SHARE = 0.1  # of a single shard
# All token ids are checked in folders up to this size; in larger ones, those in some blocks of each shard, its two ends
# among them. That finds a wrong dtype or vocabulary at once, and reads a megabyte per shard instead of 30 GB. An id
# that it does not see is refused when it is read.
FULL_CHECK_BYTES = 256 * 2**20
CHECK_BLOCKS, CHECK_BLOCK_TOKENS = 16, 2**15
CHECK_AT_ONCE_TOKENS = 2**22
DIGEST_BLOCKS, DIGEST_BLOCK_BYTES = 16, 2**16


def _write_shards(folder: Path) -> str:
    """Return the remedy for a folder that has no shards. data/demo is where the demo corpus is written by default."""
    source = "demo" if folder.parts[-2:] == ("data", "demo") else "<text> out=<folder>"
    return f"give another folder, or write shards with python -m bitnet_lit.prepare source={source}"


@dataclass
class ShardDirectory:
    """Describes a folder of shards that was opened and checked.

    Attributes:
        sizes: the number of tokens of each shard, by path, in order; the first one is for validation.
        dtype: how token ids are stored.
        vocab_size: all ids are below this number.
        tokenizer: the tokenizer that wrote the shards; None where it is not known.
        meta: the contents of meta.json; empty for llama2.c's folders.
    """

    folder: Path
    sizes: dict[Path, int]
    dtype: np.dtype
    vocab_size: int
    tokenizer: Tokenizer | None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """Return the paths of the shards in order."""
        return list(self.sizes)

    def digests(self) -> dict[str, str]:
        """Return size and hash of some blocks of each shard, by file name: they differ for another text or tokenizer.

        A megabyte of each shard is read.
        """
        return {path.name: _digest(path) for path in self.paths}

    def _sequences(self, path: Path, sequence_length: int) -> int:
        """Return the number of sequences in a shard; refuse a shard that is shorter than one."""
        tokens = self.sizes[path]
        if tokens < sequence_length + 1:
            raise UserError(
                f"{path}: {tokens} tokens, but a sequence takes {sequence_length + 1}: prepare more text, or shorten "
                "data.sequence_length"
            )
        return (tokens - 1) // sequence_length

    def _halves(self, sequence_length: int) -> tuple[int, int]:
        """Return the numbers of sequences of a single shard for validation and for training."""
        total = self._sequences(self.paths[0], sequence_length)
        validation = max(1, int(total * VALIDATION_SHARE))
        if total < 2:
            raise UserError(
                f"{self.paths[0]}: the only shard, {self.sizes[self.paths[0]]} tokens: too short to split into "
                f"validation and training at {sequence_length} tokens a sequence: prepare more text"
            )
        return validation, total - validation

    def validation(self, sequence_length: int) -> TokenSplit:
        """Return shard 0, or the first tenth of a single shard, cut into sequences of T = `sequence_length` tokens."""
        if len(self.paths) == 1:
            count = self._halves(sequence_length)[0]
        else:
            count = self._sequences(self.paths[0], sequence_length)
        return TokenSplit([Piece(self.paths[0], 0, count)], sequence_length, self.dtype, self.vocab_size)

    def train(self, sequence_length: int) -> TokenSplit:
        """Return all shards but the first, or the rest of a single shard, cut into sequences of T tokens."""
        if len(self.paths) == 1:
            validation, count = self._halves(sequence_length)
            pieces = [Piece(self.paths[0], validation * sequence_length, count)]
        else:
            pieces = [Piece(path, 0, self._sequences(path, sequence_length)) for path in self.paths[1:]]
        return TokenSplit(pieces, sequence_length, self.dtype, self.vocab_size)


def _digest(path: Path) -> str:
    size = path.stat().st_size
    last = max(0, size - DIGEST_BLOCK_BYTES)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in range(DIGEST_BLOCKS):
            file.seek(last * block // (DIGEST_BLOCKS - 1))
            digest.update(file.read(DIGEST_BLOCK_BYTES))
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def _vocab_size(folder: Path, meta: dict[str, Any], tokenizer: Tokenizer | None) -> int:
    """Return the size on which meta.json, the tokenizer and llama2.c's name of the folder agree; else refuse."""
    remedy = "give the right one (data.tokenizer), or prepare the text again"
    if meta:
        stated, where = int(meta["vocab_size"]), META_NAME
    elif named := vocab_size_in_name(folder):
        stated, where = named, "its name"
    else:
        return LLAMA2_VOCAB_SIZE if tokenizer is None else tokenizer.vocab_size
    if tokenizer is None:
        return stated
    noted = meta.get("tokenizer_sha256")
    if noted not in (None, tokenizer.sha256):
        raise UserError(
            f"tokenizer {tokenizer.path}: not the one that wrote {folder} (its sha256 is {tokenizer.sha256[:12]}..., "
            f"{META_NAME} says {noted[:12]}...): {remedy}"
        )
    if tokenizer.vocab_size > stated:
        raise UserError(
            f"tokenizer {tokenizer.path}: {tokenizer.vocab_size} entries, but {where} says that {folder} was written "
            f"with {stated}: {remedy}"
        )
    return stated


def _shard_paths(folder: Path, meta: dict[str, Any], key: str) -> list[Path]:
    """Return the paths of the shards in order; refuse a folder that does not hold just those that meta.json names."""
    try:
        paths = find_shards(folder)
    except OSError as error:
        raise UserError(f"{key}={folder}: cannot be read ({error.strerror}): check its permissions") from None
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
        try:
            for start in starts:
                file.seek(start * dtype.itemsize)
                block = np.frombuffer(file.read(min(length, tokens - start) * dtype.itemsize), dtype)
                largest = max(largest, int(block.max(initial=0)))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): check the disk, or prepare it again") from None
        if largest >= vocab_size:
            raise UserError(
                f"{path}: token id {largest} lies beyond the vocabulary of {vocab_size}: the shards and the "
                "tokenizer do not belong together (data.tokenizer), or the file is not a shard"
            )
    return tokens


def open_shards(folder: Path, tokenizer: Path | None = None, key: str = "data.dir") -> ShardDirectory:
    """Open a folder of shards and check it.

    Args:
        tokenizer: the tokenizer's file, for a folder that comes without one.
        key: the key of the command that names the folder, for errors.

    Raises:
        UserError: there is no such folder, there are no shards in it, a file is not a shard, or the tokenizer is not
            the one that wrote them; one line.
    """
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
    vocab_size = _vocab_size(folder, meta, opened)
    dtype = np.dtype(meta["dtype"]) if meta else dtype_for(vocab_size)
    try:
        whole = sum(path.stat().st_size for path in paths) <= FULL_CHECK_BYTES
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}): prepare it again") from None
    sizes = {path: _checked_size(path, dtype, vocab_size, meta, whole) for path in paths}
    return ShardDirectory(folder, sizes, dtype, vocab_size, opened, meta)
