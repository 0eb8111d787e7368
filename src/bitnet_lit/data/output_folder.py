"""The folder that `prepare` writes: one writer at a time, nothing half-written, the disk's refusals in one line.

Two calls that write the same folder would overwrite each other's notes, and append to the same download. So a call
locks the folder itself (`flock`, which a killed process lets go of), and a second one waits: when many ranks of a job
start at once, one writes and the others find it done.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bitnet_lit.atomic import remove_leftovers
from bitnet_lit.errors import disk_errors
from bitnet_lit.locks import lock
from bitnet_lit.terminal import console


@contextlib.contextmanager
def exclusive_folder(folder: Path, key: str = "out") -> Iterator[None]:
    """Make `folder`, wait until nobody else writes it, and hold it inside the block; afterwards it is gone if empty.

    Args:
        key: what the command line calls the folder.

    Raises:
        UserError: a folder that cannot be written, or a disk that is full, anywhere in the block.
    """
    with disk_errors(
        f"{key}={folder}",
        full="whole shards are kept: make room, and the same command goes on",
        refused=f"choose another {key}=",
    ):
        descriptor, has_lock = _open_locked(folder)
        try:
            remove_leftovers(folder, alone=has_lock)
            yield
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _open_locked(folder: Path) -> tuple[int, bool]:
    """A descriptor of the folder, which holds its lock until it is closed, and whether the file system knows locks."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        has_lock = lock(descriptor)
        if has_lock is False:
            console(stderr=True).print(f"{folder}: waiting for another process that writes it")
            has_lock = lock(descriptor, wait=True)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return descriptor, has_lock is True
        os.close(descriptor)  # whoever was waited for wrote nothing and removed the folder: make it again
