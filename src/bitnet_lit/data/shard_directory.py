"""A folder of shards that was opened says what there is to read: `ShardDirectory`, for a local folder and a remote one.

Shard 0 is for validation, the rest for training, as in llama2.c. A single shard is divided: its first tenth, cut on a
sequence border and at least one sequence long, is for validation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_lit.data.shard_files import ShardFiles
from bitnet_lit.data.shard_folder import META_NAME, shard_digest
from bitnet_lit.data.token_split import Piece, TokenSplit
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError

LLAMA2_VOCAB_SIZE = 32000
VALIDATION_SHARE = 0.1  # of a single shard


@dataclass
class ShardDirectory:
    """Describes a folder of shards that was opened and checked.

    Attributes:
        folder: its path or URL, for messages.
        sizes: the number of tokens of each shard, by path or URL, in order; the first one is for validation.
        dtype: how token ids are stored.
        vocab_size: all ids are below this number.
        tokenizer: the tokenizer that wrote the shards; None where it is not known.
        meta: the contents of meta.json; empty for llama2.c's folders.
    """

    folder: Path | str
    sizes: dict[Path | str, int]
    dtype: np.dtype
    vocab_size: int
    tokenizer: Tokenizer | None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path | str]:
        """Return the paths or URLs of the shards in order."""
        return list(self.sizes)

    @property
    def num_bytes(self) -> int:
        """The size of all shards together."""
        return sum(self.sizes.values()) * self.dtype.itemsize

    def digests(self) -> dict[str, str]:
        """Return size and hash of some blocks of each shard, by file name: they differ for another text or tokenizer.

        A megabyte of each shard is read.
        """
        return {Path(path).name: shard_digest(Path(path)) for path in self.paths}

    def files(self) -> ShardFiles:
        """Return what opens the shards of a split."""
        return ShardFiles()

    def _sequences(self, path: Path | str, sequence_length: int) -> int:
        """Return the number of sequences in a shard; refuse a shard that is shorter than one."""
        tokens = self.sizes[path]
        if tokens < sequence_length + 1:
            is_only, is_first = len(self.paths) == 1, path == self.paths[0]
            text = "text" if is_only else "validation text" if is_first else "training text"
            shorter = f", or take sequence_length={tokens - 1} or less" if tokens > 1 else ""
            raise UserError(
                f"{path}: {tokens} token{'s' * (tokens > 1)} of {text}, but a sequence takes {sequence_length + 1}: "
                f"prepare more {text}{shorter}"
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
        return self._split([Piece(self.paths[0], 0, count)], sequence_length)

    def train(self, sequence_length: int) -> TokenSplit:
        """Return all shards but the first, or the rest of a single shard, cut into sequences of T tokens."""
        if len(self.paths) == 1:
            validation, count = self._halves(sequence_length)
            pieces = [Piece(self.paths[0], validation * sequence_length, count)]
        else:
            pieces = [Piece(path, 0, self._sequences(path, sequence_length)) for path in self.paths[1:]]
        return self._split(pieces, sequence_length)

    def _split(self, pieces: list[Piece], sequence_length: int) -> TokenSplit:
        return TokenSplit(pieces, sequence_length, self.dtype, self.vocab_size, self.files())


def agreed_vocab_size(folder: str, named: int | None, meta: dict[str, Any], tokenizer: Tokenizer | None) -> int:
    """Return the size on which meta.json, the tokenizer and llama2.c's name of the folder agree.

    Args:
        folder: its path or URL, for messages.
        named: the size in its name; None where the name has none.

    Raises:
        UserError: they do not agree; one line.
    """
    remedy = "give the right one (data.tokenizer), or prepare the text again"
    if meta:
        stated, where = int(meta["vocab_size"]), META_NAME
    elif named:
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
