"""Files and folders are replaced as a whole: whenever the process is killed, either the old or the new one is there.

The new content is written to a temporary path beside its target, `.<name>.<number>.tmp`. It is flushed to the disk and
then renamed: a rename inside one file system is atomic. A folder that replaces another is *exchanged* with it in one
system call where there is one (Linux, macOS). Afterwards the files that the user had put into the old folder move to
the new one.

    .model.4711.tmp/
      lock        locked while the writer lives; holds the target's name
      new/        the folder being filled; after the exchange, the old folder
      names       the names in the old folder that the writer owns; written just before the exchange
      old/        the old folder, on file systems without exchange

A killed writer leaves its temporary path behind. The next write to the same target removes it, and so does
`remove_leftovers`. A living writer is recognized by its lock, which the system releases when a process ends.

Links are followed: the target of a link is replaced, and the link stays. Devices, pipes and sockets are refused. The
new file or folder gets the permissions of the old one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from bitnet_lit.errors import UserError
from bitnet_lit.locks import lock

LONGEST_NAME = 255  # bytes, on most file systems
LEFTOVER = re.compile(r"\.(.+)\.(\d+)\.tmp", re.DOTALL)
NUMBERS_ARE_USED_AGAIN = 3600  # seconds; later, a living process of that number is another one
LOCK, NEW, OLD, NAMES = "lock", "new", "old", "names"
# Held while a temporary path is made and locked: without its lock, another thread would take the writer for dead.
_claiming = threading.Lock()
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
    _remove_own_leftovers(path)
    temporary, descriptor = _claim(path, lambda name: os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
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
    _remove_own_leftovers(path)

    def make(name: Path) -> int:
        name.mkdir()
        descriptor = os.open(name / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.write(descriptor, os.fsencode(path.name))
        return descriptor

    holder, descriptor = _claim(path, make)
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
        _settle(holder, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            _settle(holder, path)
        raise
    finally:
        os.close(descriptor)


def _keep_permissions(old: Path, new: Path) -> None:
    """Copy the old permissions to the new file or folder: a model that only its owner may read stays private."""
    with contextlib.suppress(OSError):  # there is no old one, or the file system has no permissions
        mode = stat.S_IMODE(os.stat(old).st_mode)
        if mode != stat.S_IMODE(os.stat(new).st_mode):
            os.chmod(new, mode)


def remove_leftovers(folder: Path, *patterns: str, alone: bool = False) -> None:
    """Remove the temporary files that killed processes left in `folder`; those of living processes stay.

    A temporary folder of a killed `atomic_folder` may hold files of the user's. They move back to where they were.

    Args:
        patterns: patterns for the targets' names, such as "*.bin"; without one, every target matches.
        alone: whether the caller holds a lock that every writer in this folder takes, so that no writer can be alive.
    """
    with contextlib.suppress(OSError):  # there is no folder, or it cannot be listed: nothing to clean
        for name in sorted(os.listdir(folder)):
            found = LEFTOVER.fullmatch(name)
            if found and (not patterns or any(fnmatchcase(found[1], pattern) for pattern in patterns)):
                with _claiming, contextlib.suppress(OSError, ValueError):  # not ours, gone meanwhile, or damaged
                    _remove_if_abandoned(folder / name, folder / found[1], int(found[2]), alone)


def _remove_own_leftovers(path: Path) -> None:
    remove_leftovers(path.parent, escape(_stem(path.name)))


def _stem(name: str) -> str:
    """Return a target's name for use in the temporary name, shortened where that would be too long."""
    room = LONGEST_NAME - len("..0123456789.tmp")
    if len(os.fsencode(name)) <= room:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    while len(os.fsencode(name)) > room - len(digest):
        name = name[:-1]
    return name + digest


def _claim(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Create a temporary path for `path` with `make`, and lock it.

    Returns:
        The temporary path, and the descriptor that holds the lock until it is closed.
    """
    # Several threads may write one target, so the number is the thread's. For a main thread it is the process's number.
    for number in itertools.count(threading.get_native_id()):
        temporary = path.with_name(f".{_stem(path.name)}.{number}.tmp")
        with _claiming:
            try:
                descriptor = make(temporary)
            except FileExistsError:
                continue  # a process in another container can have the same number
            except OSError as error:  # a message names what the user typed
                if error.errno == errno.ENOENT and path.parent.is_dir():  # /proc says so of any new name
                    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path)) from None
                error.filename = str(path)
                raise
            lock(descriptor)
        return temporary, descriptor
    raise AssertionError("numbers have no end")


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


def _remove_if_abandoned(leftover: Path, target: Path, number: int, alone: bool) -> None:
    is_folder = leftover.is_dir() and not leftover.is_symlink()
    locked = leftover / LOCK if is_folder else leftover
    age = time.time() - max(file.lstat().st_mtime for file in (leftover, *leftover.glob("*/*")))
    descriptor = os.open(locked, os.O_RDWR | os.O_NOFOLLOW) if locked.exists() else None
    try:
        has_lock = True if descriptor is None else lock(descriptor)
        writer_may_live = _is_another_process(number) or has_lock is None
        if not alone and (has_lock is False or (writer_may_live and age < NUMBERS_ARE_USED_AGAIN)):
            return
        if is_folder:
            name = os.fsdecode(os.read(descriptor, LONGEST_NAME)) if descriptor is not None else ""
            # The temporary name may be shortened; the lock file has the full name. It is used only if they agree.
            _settle(leftover, target.with_name(name) if name and _stem(name) == target.name else target)
        else:
            leftover.unlink()
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_another_process(number: int) -> bool:
    if number == os.getpid():
        return False  # an earlier process: in a container a command gets the same number each time
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _settle(holder: Path, path: Path) -> None:
    """Clean up after a write, finished or not: move the user's files back to `path`, and delete the writer's files."""
    if (holder / OLD).is_dir() and not path.exists():
        os.rename(holder / OLD, path)  # killed between the two renames of an exchange
    folders, ours = [holder / NEW, holder / OLD], None
    if (holder / NAMES).exists():
        ours = set(json.loads((holder / NAMES).read_text(encoding="utf-8")))
    elif not (holder / LOCK).exists():  # from an older version: a name that the target has too is the writer's
        folders, ours = [holder], set(os.listdir(path)) if path.is_dir() else None
    for folder in folders:
        if ours is not None and folder.is_dir():
            for name in set(os.listdir(folder)) - ours:
                _give_back(folder / name, path)
    try:
        for folder in filter(Path.exists, folders):
            shutil.rmtree(folder)
        for name in (f"{NAMES}.part", NAMES, LOCK):
            (holder / name).unlink(missing_ok=True)
        if holder.exists():
            holder.rmdir()
    except OSError as error:
        # A network mount keeps deleted files that are still open. The lock and the names stay for the next clean-up.
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
            raise


def _give_back(entry: Path, folder: Path) -> None:
    """Move a user's file or folder into `folder`; it gets another name where its own is taken."""
    folder.mkdir(exist_ok=True)
    names = itertools.chain([entry.name], (f"{entry.name}.kept{number or ''}" for number in itertools.count()))
    target = next(folder / name for name in names if not os.path.lexists(folder / name))
    os.rename(entry, target)


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
