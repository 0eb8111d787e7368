"""A lock on a file or folder is taken here; the system releases it when its process ends, for whatever reason.

`flock` locks an open file or folder for one process at a time, and nothing has to be cleaned up after a kill. Some
network file systems have no locks. There the user must not start two writers at once.
"""

from __future__ import annotations

import fcntl


def lock(descriptor: int, wait: bool = False, shared: bool = False) -> bool | None:
    """Take the lock of an open file or folder; closing the descriptor releases it.

    Args:
        wait: whether to wait until another process releases the lock.
        shared: whether others may hold it too in this way. Whoever only asks whether a lock is held takes it so, and
            two that ask at once do not see each other.

    Returns:
        True where the lock was taken, False where another process holds it, None where the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
