"""Text files that a run appends to at each validation, and that a resumed run cuts where its checkpoint was."""

from __future__ import annotations

import os
from pathlib import Path


class AppendedFile:
    """A file of which each checkpoint notes the length, so that nothing stands in it twice after a resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def num_bytes(self) -> int:
        """Its length; 0 where it does not exist."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, text: str) -> None:
        """Write `text` behind what is there, through to the disk: the checkpoint that follows counts on it."""
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def cut(self, num_bytes: int | None) -> None:
        """Drop what was written behind a checkpoint that noted `num_bytes` (None: it noted nothing)."""
        if num_bytes is not None and self.num_bytes > num_bytes:
            os.truncate(self.path, num_bytes)
