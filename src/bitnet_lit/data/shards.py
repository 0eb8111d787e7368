"""llama2.c's shards: flat files of token ids, one story after the other, a BOS before each.

A folder of shards is one of

- ours: `dataNN.bin`, `tokenizer.model` and a `meta.json` that says dtype, vocabulary, tokenizer and sizes;
- llama2.c's `TinyStories_all_data`: `dataNN.bin` beside `dataNN.json`, Llama 2's vocabulary, uint16, no meta;
- llama2.c's `tokN` folder, with `tokN.model` beside it.

Shard 0 is for validation, the rest for training, as in llama2.c. A single shard is split inside itself: the first
tenth, cut on a sequence border and at least one sequence, is for validation.

What is in a folder is checked when it is opened; `token_split` then reads sequences from it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_lit.data.meta import META_NAME, dtype_for, read_meta
from bitnet_lit.data.token_split import Piece, TokenSplit
from bitnet_lit.data.tokenizers import Tokenizer, find_tokenizer, open_tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.regular_file import open_regular

LLAMA2_VOCAB_SIZE = 32000
VALIDATION_SHARE = 0.1  # of a single shard
# Token ids are checked in full up to this size; beyond it in some blocks of each shard, its two ends among them. That
# finds a wrong dtype or vocabulary at once and reads a megabyte per shard instead of 30 GB. What it does not see is
# refused when it is gathered.
FULL_CHECK_BYTES = 256 * 2**20
CHECK_BLOCKS, CHECK_BLOCK_TOKENS = 16, 2**15
CHECK_AT_ONCE_TOKENS = 2**22
_WRITE = "write shards with python -m bitnet_lit.prepare source=<text> out=<folder>"


@dataclass
class ShardDirectory:
    """An opened and checked folder of shards.

    Attributes:
        sizes: path to tokens of each shard, in order; the first is for validation.
        vocab_size: ids lie below it.
        tokenizer_path: None where there is none.
        meta: contents of meta.json, empty for llama2.c's folders.
    """

    folder: Path
    sizes: dict[Path, int]
    dtype: np.dtype
    vocab_size: int
    tokenizer_path: Path | None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """The shards in order."""
        return list(self.sizes)

    def _sequences(self, path: Path, sequence_length: int) -> int:
        """Sequences in a shard; at least one, or the user hears of it."""
        tokens = self.sizes[path]
        if tokens < sequence_length + 1:
            raise UserError(
                f"{path}: {tokens} tokens, but a sequence takes {sequence_length + 1}: prepare more text, or shorten "
                "data.sequence_length"
            )
        return (tokens - 1) // sequence_length

    def _halves(self, sequence_length: int) -> tuple[int, int]:
        """Sequences of a single shard for validation and for training."""
        total = self._sequences(self.paths[0], sequence_length)
        validation = max(1, int(total * VALIDATION_SHARE))
        if total < 2:
            raise UserError(
                f"{self.paths[0]}: the only shard, {self.sizes[self.paths[0]]} tokens: too short to split into "
                f"validation and training at {sequence_length} tokens a sequence: prepare more text"
            )
        return validation, total - validation

    def validation(self, sequence_length: int) -> TokenSplit:
        """Shard 0, or the first tenth of a single shard."""
        if len(self.paths) == 1:
            count = self._halves(sequence_length)[0]
        else:
            count = self._sequences(self.paths[0], sequence_length)
        return TokenSplit([Piece(self.paths[0], 0, count)], sequence_length, self.dtype, self.vocab_size)

    def train(self, sequence_length: int) -> TokenSplit:
        """All shards but the first, or the rest of a single shard."""
        if len(self.paths) == 1:
            validation, count = self._halves(sequence_length)
            pieces = [Piece(self.paths[0], validation * sequence_length, count)]
        else:
            pieces = [Piece(path, 0, self._sequences(path, sequence_length)) for path in self.paths[1:]]
        return TokenSplit(pieces, sequence_length, self.dtype, self.vocab_size)


def _find_tokenizer(folder: Path, given: Path | None) -> Path | None:
    if given is not None:
        return given
    beside = folder.parent / f"{folder.name}.model"  # llama2.c's tokN.model of the folder tokN
    return find_tokenizer(folder) or (beside if beside.is_file() else find_tokenizer(folder.parent))


def _vocab_size(folder: Path, meta: dict[str, Any], tokenizer: Tokenizer | None) -> int:
    """The vocabulary that meta.json, the tokenizer and llama2.c's name of the folder agree on."""
    remedy = "give the right one (data.tokenizer), or prepare the text again"
    named = re.fullmatch(r"tok(\d{1,9})", folder.name)
    if meta:
        stated, source = int(meta["vocab_size"]), META_NAME
    elif named and int(named.group(1)):
        stated, source = int(named.group(1)), "its name"
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
            f"tokenizer {tokenizer.path}: {tokenizer.vocab_size} entries, but {source} says that {folder} was written "
            f"with {stated}: {remedy}"
        )
    return stated


def _shard_names(folder: Path, meta: dict[str, Any]) -> list[Path]:
    """The shards of a folder in order: all that meta.json names, and no other."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".bin" and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"data.dir={folder}: cannot be read ({error.strerror}): check its permissions") from None
    if not paths:
        raise UserError(f"data.dir={folder}: no .bin shards in it: {_WRITE}")
    if "shards" in meta:
        names = {path.name for path in paths}
        if lost := set(meta["shards"]) - names:
            raise UserError(f"{folder}: {min(lost)} is missing: run the same python -m bitnet_lit.prepare again")
        if unknown := names - set(meta["shards"]):
            raise UserError(f"{folder}: {META_NAME} knows no {min(unknown)}: take that file away")
    return paths


def _checked_size(path: Path, dtype: np.dtype, vocab_size: int, meta: dict[str, Any], whole: bool) -> int:
    """Tokens of a shard, whose size and ids are checked.

    Args:
        whole: look at every id; else at some blocks (see FULL_CHECK_BYTES).
    """
    with open_regular(path, "check the file and its permissions") as file:
        size = os.fstat(file.fileno()).st_size
        if size % dtype.itemsize or not size:
            raise UserError(
                f"{path}: {size} bytes are no whole number of {dtype} tokens: the file is damaged, or no shard"
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
                "tokenizer do not belong together (data.tokenizer), or the file is no shard"
            )
    return tokens


def open_shards(folder: Path, tokenizer: Path | None = None) -> ShardDirectory:
    """Open a folder of shards and check it: everything that can be known before the first step.

    Args:
        tokenizer: for a folder that comes without one.

    Raises:
        UserError: no folder, no shards, a file that cannot be one, or a tokenizer that does not match; one line.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        what = "not a folder" if os.path.lexists(folder) else "no such folder"
        raise UserError(f"data.dir={folder}: {what}: {_WRITE}")
    meta = read_meta(folder)
    if not meta.get("complete", True):
        raise UserError(f"{folder}: not finished: run the same python -m bitnet_lit.prepare again")
    paths = _shard_names(folder, meta)
    tokenizer_path = _find_tokenizer(folder, tokenizer)
    vocab_size = _vocab_size(folder, meta, open_tokenizer(tokenizer_path) if tokenizer_path else None)
    dtype = np.dtype(meta["dtype"]) if meta else dtype_for(vocab_size)
    try:
        whole = sum(path.stat().st_size for path in paths) <= FULL_CHECK_BYTES
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}): prepare it again") from None
    sizes = {path: _checked_size(path, dtype, vocab_size, meta, whole) for path in paths}
    return ShardDirectory(folder, sizes, dtype, vocab_size, tokenizer_path, meta)
