"""Files and folders are replaced as a whole: whenever the process is killed, either the old or the new one is there.

The new content is written to a temporary path beside its target (temporary_paths.py), flushed to the disk, and then
renamed: a rename inside one file system is atomic. A folder that replaces another is *exchanged* with it in one system
call where there is one (Linux, macOS). Afterwards the files that the user had put into the old folder move to the new
one.

Links are followed: the target of a link is replaced, and the link stays. Devices, pipes and sockets are refused. The
new file or folder gets the permissions of the old one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from bitnet_lit.errors import UserError
from bitnet_lit.files.temporary_paths import LOCK, NAMES, NEW, OLD, claim, settle

NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.ENOLCK, errno.EACCES, errno.EISDIR}


def real_path(path: Path, folder: bool = False) -> Path:
    """Follow links and return the path that a write to `path` replaces.

    Args:
        folder: whether a folder is to be written there, or a file.

    Raises:
        UserError: something of another kind lies there: a device, a pipe, a folder in place of a file, ...
    """
    real = Path(os.path.realpath(path))
    try:
        mode = real.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return real
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFLNK: "a link that leads to itself",
    }
    kind, wanted = stat.S_IFMT(mode), stat.S_IFDIR if folder else stat.S_IFREG
    if kind != wanted:
        raise UserError(f"{path}: is {kinds.get(kind, 'a device')}, not {kinds[wanted]}: choose another name")
    if folder and (os.path.ismount(real) or os.path.samefile(real, os.curdir)):
        what = "a mount point" if os.path.ismount(real) else "the current folder"
        raise UserError(f"{path}: is {what}, which cannot be replaced: give the name of a folder inside it")
    return real


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; it is renamed to `path` if the block ends without an exception, and removed otherwise.

    The temporary file exists and is empty.

    Raises:
        UserError: something other than a file lies at `path`.
    """
    path = real_path(path)
    temporary, descriptor = claim(path, lambda name: os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        _keep_permissions(path, temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or the disk has already reported an error
            temporary.unlink()
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(path: Path, ours: Callable[[Path], Collection[str]] | None = None) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces `path` if the block ends without an exception.

    Args:
        ours: returns the names in the old folder that its writer wrote. They are all replaced or removed; everything
            else is the user's and stays. None: every name is the writer's.

    Raises:
        UserError: something other than a folder lies at `path`, or a file of the user's has the name of a new file.
    """
    path = real_path(path, folder=True)
    path.parent.mkdir(parents=True, exist_ok=True)

    def make(name: Path) -> int:
        name.mkdir()
        descriptor = os.open(name / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.write(descriptor, os.fsencode(path.name))
        return descriptor

    holder, descriptor = claim(path, make)
    new = holder / NEW
    try:
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            _keep_permissions(path / file.relative_to(new), file)
            sync(file)
        _keep_permissions(path, new)
        sync(new)
        _put_in_place(holder, path, ours)
        sync(path.parent)
        settle(holder, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            settle(holder, path)
        raise
    finally:
        os.close(descriptor)


def _keep_permissions(old: Path, new: Path) -> None:
    """Copy the old permissions to the new file or folder: a model that only its owner may read stays private."""
    with contextlib.suppress(OSError):  # there is no old one, or the file system has no permissions
        mode = stat.S_IMODE(os.stat(old).st_mode)
        if mode != stat.S_IMODE(os.stat(new).st_mode):
            os.chmod(new, mode)


def _put_in_place(holder: Path, path: Path, ours: Callable[[Path], Collection[str]] | None) -> None:
    if not path.exists():
        try:
            os.rename(holder / NEW, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another writer was faster: replace its folder
                raise
    written, there = set(os.listdir(holder / NEW)), set(os.listdir(path))
    replaced = there if ours is None else there & set(ours(path))
    if taken := sorted(written & there - replaced):
        raise UserError(
            f"{path / taken[0]}: a new file needs this name, and this file is not from an earlier write: move it away, "
            "or choose another folder"
        )
    _note_names(holder, written | replaced)
    _exchange(holder, path)


def _note_names(holder: Path, names: Collection[str]) -> None:
    part = holder / f"{NAMES}.part"
    part.write_text(json.dumps(sorted(names)), encoding="utf-8")
    sync(part)
    os.rename(part, holder / NAMES)  # so that the file is complete if it exists
    sync(holder)


def _exchange(holder: Path, path: Path) -> None:
    """Swap `path` and `holder`/new, in one step where the system can, otherwise by two renames."""
    library = ctypes.CDLL(None, use_errno=True)
    new, old, status = holder / NEW, holder / OLD, -1
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        at_cwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
        status = library.renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(path), rename_exchange)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        rename_swap = 2  # sys/stdio.h
        status = library.renamex_np(os.fsencode(new), os.fsencode(path), rename_swap)
    if status != 0:  # a file system without exchange
        os.rename(path, old)
        os.rename(new, path)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk, where the file system supports this."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # a folder may be writable and still not be readable
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)
