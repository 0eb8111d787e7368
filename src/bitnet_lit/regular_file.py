"""Opening a file that a user named: a regular file, or one line that says what it is instead.

A path can name more than a file of bytes. Opening a named pipe for reading waits until somebody writes into it, a
device node may never end, and a directory opens only to fail at the first read. So the kind is asked for before
anything is opened, and again afterwards, because a path can change its meaning in between.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from bitnet_lit.errors import UserError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path | str, remedy: str) -> BinaryIO:
    """Open a regular file for reading; never waits, whatever the path names.

    Args:
        remedy: what the user can do, for the end of the error's line.

    Raises:
        UserError: nothing there, no permission, or something that is no regular file; one line.
    """
    try:
        _check_kind(path, os.stat(path), remedy)
        # Between the two looks a pipe may have taken the file's place: O_NONBLOCK opens one without waiting, and
        # changes nothing for a regular file.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check_kind(path, os.fstat(descriptor), remedy)
        except UserError:
            os.close(descriptor)
            raise
        return open(descriptor, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {remedy}") from None
    except ValueError as error:  # a path with a NUL in it
        if isinstance(error, UserError):
            raise
        raise UserError(f"{str(path)!r}: cannot be read ({error}): {remedy}") from None


def _check_kind(path: Path | str, status: os.stat_result, remedy: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise UserError(f"{path}: cannot be read (it is {kind}, not a file): {remedy}")


def read_regular(path: Path | str, remedy: str, max_bytes: int) -> bytes:
    """The whole content of a regular file.

    Args:
        max_bytes: a larger file is refused before anything of it is read.

    Raises:
        UserError: as `open_regular`, a file that is too large, or a disk that fails; one line.
    """
    with open_regular(path, remedy) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise UserError(f"{path}: {size} bytes, where at most {max_bytes} make sense: {remedy}")
        try:
            return file.read(max_bytes)  # not one byte more, should it grow now
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): {remedy}") from None
