"""Shards are cut into sequences here: `TokenSplit` knows where sequence j lies, and reads batches of sequences.

Sequence j of a shard is its tokens [j * T, j * T + T + 1): T inputs and their T targets. A `pread` reads the bytes of
each sequence, so a folder of 30 GB takes no memory. A memory map would be as fast, but reading a map of a file that was
shortened, or on a disk that fails, ends the process by SIGBUS, without a message. A `pread` returns fewer bytes, or an
error.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.data.shard_files import ShardFiles
from bitnet_lit.errors import DataError

_WRITE_AGAIN = "write the shards again (python -m bitnet_lit.prepare)"


@dataclass(frozen=True)
class Piece:
    """Names a part of a shard: `num_sequences` sequences, the first of which begins at token `start`.

    Attributes:
        path: its path, or its URL where it lies in a remote folder.
    """

    path: Path | str
    start: int
    num_sequences: int


class TokenSplit:
    """Reads the training or the validation part of a folder, cut into sequences.

    Attributes:
        num_sequences: the number of sequences of all pieces.
        sequence_length: T, the tokens that a sequence predicts.
        dtype: how token ids are stored.
        vocab_size: all token ids are below this number.
        files: opens the shards.
    """

    def __init__(
        self,
        pieces: list[Piece],
        sequence_length: int,
        dtype: np.dtype,
        vocab_size: int,
        files: ShardFiles | None = None,
    ) -> None:
        self.pieces, self.sequence_length, self.dtype, self.vocab_size = pieces, sequence_length, dtype, vocab_size
        self._firsts = np.cumsum([0] + [piece.num_sequences for piece in pieces])
        self._starts = np.array([piece.start for piece in pieces], dtype=np.int64)
        self.num_sequences = int(self._firsts[-1])
        self.files = ShardFiles() if files is None else files

    def first(self, count: int) -> TokenSplit:
        """Return the split of the first `count` sequences, or of all where there are fewer."""
        ends = np.minimum(self._firsts, count)
        pieces = [
            replace(piece, num_sequences=int(n)) for piece, n in zip(self.pieces, np.diff(ends), strict=True) if n
        ]
        return TokenSplit(pieces, self.sequence_length, self.dtype, self.vocab_size, self.files)

    def gather(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read the token ids, int64 (B, T + 1), of the sequences with these numbers, int64 (B,).

        Raises:
            DataError: a shard is gone or cannot be fetched, is shorter than it was, or holds ids beyond the
                vocabulary; one line.
        """
        pieces = np.searchsorted(self._firsts, indices, side="right") - 1
        tokens = (indices - self._firsts[pieces]) * self.sequence_length + self._starts[pieces]
        rows = np.empty((len(indices), self.sequence_length + 1), dtype=self.dtype)
        content, row_bytes = rows.view(np.uint8).reshape(-1).data, rows.strides[0]
        at = 0
        try:
            for piece, offset in zip(pieces.tolist(), (tokens * self.dtype.itemsize).tolist(), strict=True):
                self._read(self.pieces[piece].path, content[at : at + row_bytes], offset)
                at += row_bytes
        finally:
            self.files.release()
        if len(rows) and rows.max() >= self.vocab_size:
            row = int(rows.max(axis=1).argmax())
            raise DataError(
                f"{self.pieces[pieces[row]].path}: token id {rows[row].max()} lies beyond the vocabulary of "
                f"{self.vocab_size}: {_WRITE_AGAIN}"
            )
        return rows.astype(np.int64)

    def _read(self, path: Path | str, room: memoryview, offset: int) -> None:
        """Fill `room` with the bytes of a shard from `offset` on."""
        try:
            descriptor = self.files[path]
            got = os.preadv(descriptor, [room], offset)
        except OSError as error:
            raise DataError(f"{path}: cannot be read any more ({error.strerror}): {_WRITE_AGAIN}") from None
        if got != len(room):
            size = os.fstat(descriptor).st_size
            raise DataError(f"{path}: ends at byte {size}, earlier than when it was opened: {_WRITE_AGAIN}")
