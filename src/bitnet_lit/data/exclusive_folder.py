"""`exclusive_folder` lets one call at a time write a folder, and turns the disk's refusals into one line.

Two calls that write one folder would overwrite each other's meta.json, and append to the same download. So a call locks
the folder (`flock`, which ends with the process, also if that is killed) and a second call waits. When all ranks of a
job prepare the data at once, one of them writes, and the others find it done.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bitnet_lit.errors import disk_errors
from bitnet_lit.files.locks import lock
from bitnet_lit.files.temporary_paths import remove_leftovers
from bitnet_lit.terminal import console


@contextlib.contextmanager
def exclusive_folder(folder: Path, key: str = "out") -> Iterator[None]:
    """Make `folder`, wait until no other process writes it, and hold it inside the block; remove it if it stays empty.

    Args:
        key: the name of the folder's option on the command line.

    Raises:
        UserError: the folder cannot be written, or the disk is full, anywhere in the block.
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
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()  # under the lock: a call that waits for it then finds that the folder is gone
            os.close(descriptor)


def _open_locked(folder: Path) -> tuple[int, bool]:
    """Return a descriptor that holds the lock until it is closed, and whether the file system has locks."""
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
        os.close(descriptor)  # the other process wrote nothing and removed the folder: make it again
