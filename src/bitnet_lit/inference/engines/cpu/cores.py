"""How many threads the engine takes: one on each physical core that this process may use.

The system may allow a process less than the machine has: only some processors (`taskset`, a batch system), or a share
of their time (a container's quota). More threads than that take turns, and each step waits for the last of them.
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

from bitnet_lit.control_groups import cpu_quota
from bitnet_lit.errors import UserError


def _usable_cpus() -> set[int]:
    """The numbers of the logical processors that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _at_most(processors: int) -> int:
    return max(1, math.ceil(min(cpu_quota(), processors)))


def physical_cores() -> int:
    """The number of cores that this process may use; hyper-threads of a core count once, if the system names them."""
    usable = _usable_cpus()
    topology = Path("/sys/devices/system/cpu")
    siblings = {_read(topology / f"cpu{cpu}/topology/thread_siblings_list").strip() for cpu in usable}
    return _at_most(len(usable) if "" in siblings else len(siblings))


def allowed_threads(threads: int | None) -> int:
    """How many threads the engine takes where `threads` are asked for: no more than this process may use processors.

    Raises:
        UserError: `threads` is neither None nor a whole number from 1 on.
    """
    if threads is None:
        return physical_cores()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise UserError(f"threads={threads!r}: must be a whole number from 1 on, or null for one on each core")
    most = _at_most(len(_usable_cpus()))
    if threads > most:
        warnings.warn(f"threads={threads}: this process may use {most} processors: {most} threads", stacklevel=2)
    return min(threads, most)
