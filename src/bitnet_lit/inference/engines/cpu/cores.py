"""How many threads are worth having: one on each core that this process may use.

The system may allow a process less than the machine has: some processors only (`taskset`, a batch system), or a share
of their time (a container's quota). A thread beyond that takes turns with the others.
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

from bitnet_lit.errors import UserError


def _usable_cpus() -> set[int]:
    """The logical processors that the system lets this process run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _allowance(quota: str, period: str) -> float:
    """Processors whose time is `quota` in each `period`, both in microseconds; infinite where none is set."""
    try:
        share = float(quota) / float(period)
    except (ValueError, ZeroDivisionError):
        return math.inf
    return share if share > 0 else math.inf


def quota(root: Path = Path("/")) -> float:
    """Processors that the control groups of this process allow; infinite where they set no quota.

    Args:
        root: of the file system; tests have another.
    """
    allowed = math.inf
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 has no controllers in the line. Each group above may have a quota of its own.
        mount = root / "sys/fs/cgroup" / (controllers and "cpu")
        folder = Path(group.lstrip("/"))
        for above in [folder, *folder.parents]:
            if controllers:
                values = [_read(mount / above / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            else:
                values = _read(mount / above / "cpu.max").split()
            if len(values) == 2:
                allowed = min(allowed, _allowance(*values))
    return allowed


def _at_most(processors: int) -> int:
    return max(1, math.ceil(min(quota(), processors)))


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once where the system says which they are."""
    usable = _usable_cpus()
    topology = Path("/sys/devices/system/cpu")
    siblings = {_read(topology / f"cpu{cpu}/topology/thread_siblings_list").strip() for cpu in usable}
    return _at_most(len(usable) if "" in siblings else len(siblings))


def allowed_threads(threads: int | None) -> int:
    """The threads to take where `threads` are asked for: no more than processors that this process may use.

    Raises:
        UserError: no whole number from 1 on.
    """
    if threads is None:
        return physical_cores()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise UserError(f"threads={threads!r}: must be a whole number from 1 on, or null for one on each core")
    most = _at_most(len(_usable_cpus()))
    if threads > most:
        warnings.warn(f"threads={threads}: this process may use {most} processors: {most} threads", stacklevel=2)
    return min(threads, most)
