"""llama2.c's shards: flat files of token ids, one story after the other, a BOS before each.

A folder of shards is one of

- ours: `dataNN.bin`, `tokenizer.model` and a `meta.json` that says dtype, vocabulary, tokenizer and sizes;
- llama2.c's `TinyStories_all_data`: `dataNN.bin` beside `dataNN.json`, Llama 2's vocabulary, uint16, no meta;
- llama2.c's `tokN` folder, with `tokN.model` beside it.

Shard 0 is for validation, the rest for training, as in llama2.c. A single shard is split inside itself: the first
tenth, cut on a sequence border and at least one sequence, is for validation.

Sequence j of a shard is tokens [j*T, j*T + T + 1): T inputs and their T targets. Shards are memory-mapped, so a
folder of 30 GB costs no memory but the pages that are being read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.data.json_tokenizer import find_tokenizer, open_tokenizer
from bitnet_lit.errors import UserError

META_NAME = "meta.json"
LLAMA2_VOCAB_SIZE = 32000
VALIDATION_SHARE = 0.1  # of a single shard
# Token ids are checked in full up to this size; beyond it in some blocks of each shard, its two ends among them. That
# finds a wrong dtype or vocabulary at once and reads a megabyte per shard instead of 30 GB.
FULL_CHECK_BYTES = 256 * 2**20
CHECK_BLOCKS, CHECK_BLOCK_TOKENS = 16, 2**15


def dtype_for(vocab_size: int) -> np.dtype:
    """uint16, or uint32 for vocabularies that do not fit."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


@dataclass(frozen=True)
class Piece:
    """A part of a shard: `num_sequences` sequences from token `start` on."""

    path: Path
    start: int
    num_sequences: int


class TokenSplit:
    """The training or the validation part of a folder, cut into sequences.

    Attributes:
        num_sequences: how many there are.
        sequence_length: T, tokens a sequence predicts.
    """

    def __init__(self, pieces: list[Piece], sequence_length: int, dtype: np.dtype) -> None:
        self.pieces, self.sequence_length, self.dtype = pieces, sequence_length, dtype
        self._firsts = np.cumsum([0] + [piece.num_sequences for piece in pieces])
        self.num_sequences = int(self._firsts[-1])
        self._maps: dict[int, NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A loader's process maps the files itself: sending a memory map would send its contents.
        return {**self.__dict__, "_maps": {}}

    def _windows(self, index: int) -> NDArray[Any]:
        """(num_sequences, T + 1) view of a piece, mapped at first use."""
        if index not in self._maps:
            piece, length = self.pieces[index], self.sequence_length
            tokens = np.memmap(
                piece.path,
                dtype=self.dtype,
                mode="r",
                offset=piece.start * self.dtype.itemsize,
                shape=(piece.num_sequences * length + 1,),
            )
            windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), length + 1)
            self._maps[index] = windows[::length]
        return self._maps[index]

    def gather(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 (B,) sequence numbers to int64 (B, T + 1) token ids."""
        pieces = np.searchsorted(self._firsts, indices, side="right") - 1
        order = np.argsort(pieces, kind="stable")  # rows of one piece side by side: one copy for all of them
        pieces, places = pieces[order], (indices - self._firsts[pieces])[order]
        borders = [0, *(np.flatnonzero(np.diff(pieces)) + 1).tolist(), len(indices)]
        rows = np.empty((len(indices), self.sequence_length + 1), dtype=self.dtype)
        for start, stop in pairwise(borders):
            rows[start:stop] = self._windows(int(pieces[start]))[places[start:stop]]
        out = np.empty(rows.shape, dtype=np.int64)
        out[order] = rows
        return out


@dataclass
class ShardDirectory:
    """An opened and checked folder of shards.

    Attributes:
        paths: the shards in order; the first is for validation.
        vocab_size: ids lie below it.
        tokenizer_path: None where there is none.
        meta: contents of meta.json, empty for llama2.c's folders.
    """

    folder: Path
    paths: list[Path]
    dtype: np.dtype
    vocab_size: int
    tokenizer_path: Path | None
    meta: dict[str, Any] = field(default_factory=dict)

    def _num_tokens(self, path: Path) -> int:
        return path.stat().st_size // self.dtype.itemsize

    def _sequences(self, path: Path, sequence_length: int) -> int:
        """Sequences in a shard; at least one, or the user hears of it."""
        tokens = self._num_tokens(path)
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
                f"{self.paths[0]}: the only shard, {self._num_tokens(self.paths[0])} tokens: too short to split into "
                f"validation and training at {sequence_length} tokens a sequence: prepare more text"
            )
        return validation, total - validation

    def validation(self, sequence_length: int) -> TokenSplit:
        """Shard 0, or the first tenth of a single shard."""
        if len(self.paths) == 1:
            count = self._halves(sequence_length)[0]
        else:
            count = self._sequences(self.paths[0], sequence_length)
        return TokenSplit([Piece(self.paths[0], 0, count)], sequence_length, self.dtype)

    def train(self, sequence_length: int) -> TokenSplit:
        """All shards but the first, or the rest of a single shard."""
        if len(self.paths) == 1:
            validation, count = self._halves(sequence_length)
            pieces = [Piece(self.paths[0], validation * sequence_length, count)]
        else:
            pieces = [Piece(path, 0, self._sequences(path, sequence_length)) for path in self.paths[1:]]
        return TokenSplit(pieces, sequence_length, self.dtype)


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META_NAME
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["dtype"] not in ("uint16", "uint32") or int(meta["vocab_size"]) <= 0:
            raise ValueError(f"dtype {meta['dtype']}, vocab_size {meta['vocab_size']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be used ({type(error).__name__}: {error}): prepare the folder again") from None
    if not meta.get("complete", True):
        raise UserError(f"{folder}: not finished: run the same python -m bitnet_lit.prepare again")
    return dict(meta)


def _find_tokenizer(folder: Path, given: Path | None) -> Path | None:
    if given is not None:
        return given
    beside = folder.parent / f"{folder.name}.model"  # llama2.c's tokN.model of the folder tokN
    return find_tokenizer(folder) or (beside if beside.is_file() else find_tokenizer(folder.parent))


def _check_tokens(directory: ShardDirectory) -> None:
    """Refuse ids beyond the vocabulary; see FULL_CHECK_BYTES."""
    whole = sum(path.stat().st_size for path in directory.paths) <= FULL_CHECK_BYTES
    for path in directory.paths:
        tokens = np.memmap(path, dtype=directory.dtype, mode="r")
        if whole or len(tokens) <= CHECK_BLOCKS * CHECK_BLOCK_TOKENS:
            largest = int(tokens.max())
        else:
            starts = np.linspace(0, len(tokens) - CHECK_BLOCK_TOKENS, CHECK_BLOCKS).astype(np.int64)
            largest = max(int(tokens[start : start + CHECK_BLOCK_TOKENS].max()) for start in starts)
        if largest >= directory.vocab_size:
            raise UserError(
                f"{path}: token id {largest} lies beyond the vocabulary of {directory.vocab_size}: the shards and the "
                "tokenizer do not belong together (data.tokenizer), or the file is no shard"
            )


def open_shards(folder: Path, tokenizer: Path | None = None) -> ShardDirectory:
    """Open a folder of shards and check it: everything that can be known before the first step.

    Args:
        tokenizer: for a folder that comes without one.

    Raises:
        UserError: no folder, no shards, a file that cannot be one, or a tokenizer that does not match; one line.
    """
    folder = Path(folder)
    remedy = "write shards with python -m bitnet_lit.prepare source=<text> out=<folder>"
    if not folder.is_dir():
        raise UserError(f"data.dir={folder}: no such folder: {remedy}")
    paths = sorted(folder.glob("*.bin"))
    if not paths:
        raise UserError(f"data.dir={folder}: no .bin shards in it: {remedy}")
    meta = _read_meta(folder)
    tokenizer_path = _find_tokenizer(folder, tokenizer)
    opened = open_tokenizer(tokenizer_path) if tokenizer_path else None
    named = re.fullmatch(r"tok(\d+)", folder.name)
    if meta:
        vocab_size = int(meta["vocab_size"])
    elif opened is not None:
        vocab_size = opened.vocab_size
    else:
        vocab_size = int(named.group(1)) if named else LLAMA2_VOCAB_SIZE
    if opened is not None and meta and meta.get("tokenizer_sha256") not in (None, opened.sha256):
        raise UserError(
            f"tokenizer {tokenizer_path}: not the one that wrote {folder} (its sha256 is {opened.sha256[:12]}..., "
            f"{META_NAME} says {meta['tokenizer_sha256'][:12]}...): give the right one, or prepare the text again"
        )
    dtype = np.dtype(meta["dtype"]) if meta else dtype_for(vocab_size)
    if "shards" in meta:
        names = {path.name for path in paths}
        if lost := set(meta["shards"]) - names:
            raise UserError(f"{folder}: {min(lost)} is missing: run the same python -m bitnet_lit.prepare again")
        if unknown := names - set(meta["shards"]):
            raise UserError(f"{folder}: {META_NAME} knows no {min(unknown)}: take that file away")
    for path in paths:
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from None
        if size % dtype.itemsize or not size:
            raise UserError(
                f"{path}: {size} bytes are no whole number of {dtype} tokens: the file is damaged, or no shard"
            )
        noted = meta.get("shards", {}).get(path.name)
        if noted and noted["tokens"] * dtype.itemsize != size:
            raise UserError(
                f"{path}: {size // dtype.itemsize} tokens, but {META_NAME} says {noted['tokens']}: prepare it again"
            )
    directory = ShardDirectory(folder, paths, dtype, vocab_size, tokenizer_path, meta)
    _check_tokens(directory)
    return directory
