"""Locks that end with the process that holds them, however it ends.

`flock` locks an open file or folder for one process at a time; nothing has to be cleaned up after a kill. Some network
file systems know no locks: there two writers are the user's to avoid.
"""

from __future__ import annotations

import fcntl


def lock(descriptor: int, wait: bool = False) -> bool | None:
    """Take the lock of an open file or folder; closing the descriptor gives it back.

    Args:
        wait: until whoever has it lets go.

    Returns:
        True, False where another process has it, or None where the file system knows no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
