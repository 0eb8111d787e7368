"""Files and folders that are either the old ones or the new ones, whenever the process is killed.

What is written goes to a temporary name beside its target, is flushed to the disk and then renamed: a rename inside
one file system is atomic. A folder that replaces another is *exchanged* with it in one system call where the
system has one (Linux, macOS).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write; becomes `path` when the block ends without an exception, else it is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; takes the place of `path` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        if path.exists():
            _exchange(temporary, path)
        else:
            temporary.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # the old folder after an exchange, or a failed attempt


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders; in one step where the system can, in two renames elsewhere."""
    library = ctypes.CDLL(None, use_errno=True)
    status = -1
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        at_cwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
        status = library.renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), rename_exchange)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        rename_swap = 2  # sys/stdio.h
        status = library.renamex_np(os.fsencode(a), os.fsencode(b), rename_swap)
    if status != 0:  # a file system without exchange
        old = b.with_name(f"{a.name}.old")
        b.rename(old)
        a.rename(b)
        old.rename(a)
