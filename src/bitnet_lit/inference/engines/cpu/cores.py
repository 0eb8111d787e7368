"""The engine takes one thread on each physical core that this process may use; the number is found here.

The system may allow a process less than the machine has: only some processors (`taskset`, a batch system), or a share
of their time (a container's quota). More threads than that take turns, and each step waits for the last of them.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from bitnet_lit.control_groups import processors, read_text, usable_cpus
from bitnet_lit.errors import UserError


def physical_cores() -> int:
    """Return how many cores this process may use; hyper-threads of a core count once, if the system names them."""
    usable = usable_cpus()
    topology = Path("/sys/devices/system/cpu")
    siblings = {read_text(topology / f"cpu{cpu}/topology/thread_siblings_list").strip() for cpu in usable}
    return processors(len(usable) if "" in siblings else len(siblings))


def allowed_threads(threads: int | None) -> int:
    """Return how many of the `threads` that are asked for the engine takes: at most the processors that it may use.

    Raises:
        UserError: `threads` is neither None nor a whole number from 1 on.
    """
    if threads is None:
        return physical_cores()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise UserError(f"threads={threads!r}: must be a whole number from 1 on, or null for one on each core")
    most = processors()
    if threads > most:
        warnings.warn(f"threads={threads}: this process may use {most} processors: {most} threads", stacklevel=2)
    return min(threads, most)
