"""The folder that `prepare` writes: one writer at a time, nothing half-written, the disk's refusals in one line.

Two calls that write the same folder would overwrite each other's notes, and append to the same download. So a call
locks the folder itself (`flock`, which a killed process lets go of), and a second one waits: when many ranks of a job
start at once, one writes and the others find it done. Whoever holds the lock knows that the temporary files in the
folder are leftovers of a killed call.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from bitnet_lit.errors import UserError


@contextlib.contextmanager
def exclusive_folder(folder: Path) -> Iterator[None]:
    """Make `folder`, wait until nobody else writes it, and hold it inside the block; afterwards it is gone if empty.

    Raises:
        UserError: a folder that cannot be written, or a disk that is full, anywhere in the block.
    """
    with _disk_errors(folder):
        descriptor = _open_locked(folder)
        try:
            _remove_leftovers(folder)
            yield
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _open_locked(folder: Path) -> int:
    """A descriptor of the folder, which holds its lock until it is closed."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        _lock(descriptor, folder)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return descriptor
        os.close(descriptor)  # whoever was waited for wrote nothing and removed the folder: make it again


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        Console(stderr=True).print(f"{folder}: waiting for another process that writes it", soft_wrap=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        # Some network file systems know no locks: two writers are the user's to avoid there.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL):
            raise


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed processes had begun to write (`bitnet_lit.atomic` names it .<name>.<process>.tmp)."""
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"out={folder}: {error.strerror}: whole shards are kept: make room, and the same command goes on"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"out={folder}: cannot be written ({error.strerror}): choose another out=") from None
        raise
