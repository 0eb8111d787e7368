"""A file that a user named is opened here only if it is a regular file; otherwise an error says what it is.

A path can name other things than a regular file. Opening a named pipe for reading waits until a process writes into it,
reading a device may never end, and a directory fails at the first read. So the kind is checked before the file is
opened, and once more afterwards, because another file may have taken its place in between.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from bitnet_lit.errors import UserError, read_errors

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path | str, remedy: str) -> BinaryIO:
    """Open a regular file for reading, without ever waiting.

    Args:
        remedy: the end of an error message: what the user can do.

    Raises:
        UserError: there is no file, the user may not read it, or it is not a regular file.
    """
    try:
        _check_kind(path, os.stat(path), remedy)
        # Between the two checks a pipe may take the file's place. O_NONBLOCK opens a pipe without waiting and changes
        # nothing for a regular file.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check_kind(path, os.fstat(descriptor), remedy)
        except UserError:
            os.close(descriptor)
            raise
        return open(descriptor, "rb")
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check its permissions") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {remedy}") from None
    except ValueError as error:  # the path holds a NUL character
        if isinstance(error, UserError):
            raise
        raise UserError(f"{str(path)!r}: cannot be read ({error}): {remedy}") from None


def _check_kind(path: Path | str, status: os.stat_result, remedy: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise UserError(f"{path}: cannot be read (it is {kind}, not a file): {remedy}")


def check_replaceable(path: Path, start: re.Pattern[bytes], why: str, remedy: str, key: str = "") -> None:
    """Refuse to replace a file that this package did not write.

    Args:
        start: how the files begin that this package writes, in their first 64 KiB.
        why: the middle of the error message, such as "no report wrote it".
        key: what the message has before the path, such as "out=".

    Raises:
        UserError: something lies there that is not ours; or it cannot be read.
    """
    if os.path.lexists(path):
        with open_regular(path, remedy) as file:
            if not start.match(file.read(2**16)):
                raise UserError(f"{key}{path}: is there already, and {why}: {remedy}")


def read_regular(path: Path | str, remedy: str, max_bytes: int) -> bytes:
    """Read the whole content of a regular file.

    Args:
        remedy: the end of an error message: what the user can do.
        max_bytes: a larger file is refused before it is read.

    Raises:
        UserError: the same errors as in `open_regular`; or the file is too large, or the disk fails.
    """
    with open_regular(path, remedy) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise UserError(f"{path}: {size} bytes, but at most {max_bytes} are allowed: {remedy}")
        with read_errors(path, remedy):
            return file.read(max_bytes)  # the file may grow while it is read
