"""A run appends to text files at each validation, and a resumed run cuts them where its checkpoint was written."""

from __future__ import annotations

import os
from pathlib import Path


class AppendedFile:
    """Appends to a file whose length is kept in each checkpoint, so that a resumed run writes nothing twice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def num_bytes(self) -> int:
        """Length of the file in bytes; 0 where it does not exist."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, text: str) -> None:
        """Append `text` and flush it to the disk, because the next checkpoint counts its bytes."""
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def cut(self, num_bytes: int | None) -> None:
        """Drop what was written after a checkpoint.

        Args:
            num_bytes: length of the file in the checkpoint; None where the checkpoint has none, and nothing is dropped.
        """
        if num_bytes is not None and self.num_bytes > num_bytes:
            os.truncate(self.path, num_bytes)
