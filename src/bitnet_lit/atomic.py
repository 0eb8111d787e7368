"""Files and folders that are either the old ones or the new ones, whenever the process is killed.

What is written goes to a temporary name beside its target, `.<name>.<number>.tmp`, is flushed to the disk and then
renamed: a rename inside one file system is atomic. A folder that replaces another is *exchanged* with it in one system
call where the system has one (Linux, macOS), and afterwards the files that its user had put there move to the new one.

    .model.4711.tmp/
      lock        held while the writer lives; holds the target's name
      new/        being filled; after the exchange, the old folder
      names       which names in the old folder are the writer's; there when the exchange is due
      old/        the old folder, on file systems without exchange

A killed writer leaves its temporary name behind. The next write of the same target removes it, and so does
`remove_leftovers`: a writer holds a lock on what it writes, which the system takes from a process that dies.

Links are followed: what a link points to is replaced, and the link stays. Devices, pipes and sockets are refused. What
takes the place of a file or a folder has its permissions too.
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
NUMBERS_ARE_USED_AGAIN = 3600  # seconds after which a living process of that number is no longer taken for the writer
LOCK, NEW, OLD, NAMES = "lock", "new", "old", "names"
# Held from the making of a temporary name until it is locked: another thread takes one without a lock for a dead one's.
_claiming = threading.Lock()
NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.ENOLCK, errno.EACCES, errno.EISDIR}


def real_path(path: Path, folder: bool = False) -> Path:
    """The path that a write to `path` goes to: links are followed.

    Args:
        folder: what is to be written there: a folder, or a file.

    Raises:
        UserError: something else lies there: a device, a pipe, a folder in place of a file, ...
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
    """A temporary path to write; becomes `path` when the block ends without an exception, else it is removed.

    The temporary file exists already, and is empty.

    Raises:
        UserError: something that is no file lies at `path`.
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
        with contextlib.suppress(OSError):  # gone by the rename; or the disk failed, and said so before
            temporary.unlink()
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(path: Path, ours: Callable[[Path], Collection[str]] | None = None) -> Iterator[Path]:
    """A temporary folder to fill; takes the place of `path` when the block ends without an exception.

    Args:
        ours: the names in an existing folder that its writer wrote. They are replaced as a whole; everything else is
            the user's and stays. None: every name is the writer's.

    Raises:
        UserError: something lies at `path` that is no folder, or the user's own file stands where one of the new
            folder's must go.
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
        with contextlib.suppress(OSError):  # what went wrong first is what the user hears
            _settle(holder, path)
        raise
    finally:
        os.close(descriptor)


def _keep_permissions(old: Path, new: Path) -> None:
    """Give what replaces a file or a folder its permissions: a model that only its owner may read stays so."""
    with contextlib.suppress(OSError):  # there is none yet, or a file system without permissions
        mode = stat.S_IMODE(os.stat(old).st_mode)
        if mode != stat.S_IMODE(os.stat(new).st_mode):
            os.chmod(new, mode)


def remove_leftovers(folder: Path, *patterns: str, alone: bool = False) -> None:
    """Remove what killed processes had begun to write in `folder`; what a living one is writing stays.

    A killed `atomic_folder` may hold files of the user's: they go back to where they were.

    Args:
        patterns: of the targets' names, such as "*.bin"; none: all of them.
        alone: whether the caller holds a lock of the folder that every writer in it takes, so that none can live.
    """
    with contextlib.suppress(OSError):  # no folder, or none that may be listed: nothing to clean
        for name in sorted(os.listdir(folder)):
            found = LEFTOVER.fullmatch(name)
            if found and (not patterns or any(fnmatchcase(found[1], pattern) for pattern in patterns)):
                with _claiming, contextlib.suppress(OSError, ValueError):  # somebody else's, gone meanwhile, or damaged
                    _remove_if_abandoned(folder / name, folder / found[1], int(found[2]), alone)


def _remove_own_leftovers(path: Path) -> None:
    remove_leftovers(path.parent, escape(_stem(path.name)))


def _stem(name: str) -> str:
    """A target's name as it stands in the temporary one: shortened where that would be too long."""
    room = LONGEST_NAME - len("..0123456789.tmp")
    if len(os.fsencode(name)) <= room:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    while len(os.fsencode(name)) > room - len(digest):
        name = name[:-1]
    return name + digest


def _claim(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Make a temporary name of `path` with `make`, and lock it.

    Returns:
        The name, and the descriptor that holds the lock until it is closed.
    """
    # The number of a thread, because several may write one target; that of a process's first thread is the process's.
    for number in itertools.count(threading.get_native_id()):
        temporary = path.with_name(f".{_stem(path.name)}.{number}.tmp")
        with _claiming:
            try:
                descriptor = make(temporary)
            except FileExistsError:
                continue  # of a process in another container, which counts from one as this one does
            lock(descriptor)
        return temporary, descriptor
    raise AssertionError("numbers have no end")


def _put_in_place(holder: Path, path: Path, ours: Callable[[Path], Collection[str]] | None) -> None:
    if not path.exists():
        try:
            os.rename(holder / NEW, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another writer was faster: replace what it wrote
                raise
    written, there = set(os.listdir(holder / NEW)), set(os.listdir(path))
    replaced = there if ours is None else there & set(ours(path))
    if taken := sorted(written & there - replaced):
        raise UserError(
            f"{path / taken[0]}: a file of that name is to be written, and this one was not: move it away, or choose "
            "another folder"
        )
    _note_names(holder, written | replaced)
    _exchange(holder, path)


def _note_names(holder: Path, names: Collection[str]) -> None:
    part = holder / f"{NAMES}.part"
    part.write_text(json.dumps(sorted(names)), encoding="utf-8")
    sync(part)
    os.rename(part, holder / NAMES)  # whole, or not there
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
            # The name in the temporary one may be shortened. Nothing but a name beside it is believed.
            _settle(leftover, target.with_name(name) if name and _stem(name) == target.name else target)
        else:
            leftover.unlink()
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_another_process(number: int) -> bool:
    if number == os.getpid():
        return False  # of an earlier life: in a container a command has the same number each time
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _settle(holder: Path, path: Path) -> None:
    """End a write, finished or not: the user's files go back to `path`, the writer's old or half-made ones go."""
    if (holder / OLD).is_dir() and not path.exists():
        os.rename(holder / OLD, path)  # killed between the two renames of an exchange
    folders, ours = [holder / NEW, holder / OLD], None
    if (holder / NAMES).exists():
        ours = set(json.loads((holder / NAMES).read_text(encoding="utf-8")))
    elif not (holder / LOCK).exists():  # an older version's: what the target has too is the writer's
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
        # A network mount keeps deleted files for whoever has them open. The lock and the names stay for the next time.
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
            raise


def _give_back(entry: Path, folder: Path) -> None:
    """Move a user's file or folder; where one of its name lies there by now, it gets another name."""
    folder.mkdir(exist_ok=True)
    names = itertools.chain([entry.name], (f"{entry.name}.kept{number or ''}" for number in itertools.count()))
    target = next(folder / name for name in names if not os.path.lexists(folder / name))
    os.rename(entry, target)


def _exchange(holder: Path, path: Path) -> None:
    """Swap `path` and `holder`/new; in one step where the system can, in two renames elsewhere."""
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
    """Wait until a file, or the names in a folder, are on the disk; some file systems cannot say of a folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # one that may be written and not listed
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)
