"""Writers fill a temporary path beside their target, which is locked while the writer lives.

The path is `.<name>.<number>.tmp`: a file, or a folder that holds the new folder and what is needed to clean up:

    .model.4711.tmp/
      lock        locked while the writer lives; holds the target's name
      new/        the folder being filled; after the exchange, the old folder
      names       the names in the old folder that the writer owns; written just before the exchange
      old/        the old folder, on file systems without exchange

A killed writer leaves its temporary path behind. The next write to the same target removes it, and so does
`remove_leftovers`. A living writer is recognized by its lock, which the system releases when a process ends.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from bitnet_lit.files.locks import lock

LONGEST_NAME = 255  # bytes, on most file systems
LEFTOVER = re.compile(r"\.(.+)\.(\d+)\.tmp", re.DOTALL)
NUMBERS_ARE_USED_AGAIN = 3600  # seconds; later, a living process of that number is another one
LOCK, NEW, OLD, NAMES = "lock", "new", "old", "names"
# Held while a temporary path is made and locked: without its lock, another thread would take the writer for dead.
_claiming = threading.Lock()


def _stem(name: str) -> str:
    """Return a target's name for use in the temporary name, shortened where that would be too long."""
    room = LONGEST_NAME - len("..0123456789.tmp")
    if len(os.fsencode(name)) <= room:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    while len(os.fsencode(name)) > room - len(digest):
        name = name[:-1]
    return name + digest


def claim(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Create a temporary path for `path` with `make`, and lock it; what killed writers of `path` left is removed first.

    Returns:
        The temporary path, and the descriptor that holds the lock until it is closed.
    """
    remove_leftovers(path.parent, escape(_stem(path.name)))
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
            settle(leftover, target.with_name(name) if name and _stem(name) == target.name else target)
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


def settle(holder: Path, path: Path) -> None:
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
