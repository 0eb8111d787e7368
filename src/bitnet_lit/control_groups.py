"""Linux's control groups limit the CPU time and memory of a container or a batch job; the limits are read here.

A process belongs to one group of each hierarchy. Every parent group may have a limit of its own, and the smallest limit
counts. Version 2 has one hierarchy below /sys/fs/cgroup (`memory.max`, `cpu.max`); version 1 has one for each
controller. See the kernel's Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def read_text(path: Path) -> str:
    """Return the content of a file of the kernel; an empty text where there is no such file."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(text: str) -> float:
    """Return the number that a text holds; NaN for any other text, such as "max" or an empty file."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _limits(controller: str, name: str, names_v1: tuple[str, ...], root: Path) -> Iterator[list[float]]:
    """Yield the numbers of a limit for each group that this process belongs to, and for its parent groups.

    Args:
        controller: "cpu" or "memory".
        name: the limit's file in version 2, which holds all its numbers.
        names_v1: the limit's files in version 1, one for each number.
        root: the root of the file system.
    """
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controllers and controller)  # version 2 names no controllers in the line
        folder = Path(group.lstrip("/"))
        for above in (mount / each for each in (folder, *folder.parents)):
            texts = [read_text(above / each) for each in names_v1] if controllers else read_text(above / name).split()
            yield [_number(text) for text in texts]


def cpu_quota(root: Path = ROOT) -> float:
    """Return how many CPU cores' time this process may use; infinity where there is no quota.

    Args:
        root: the root of the file system; tests pass another.
    """
    allowed = math.inf
    for numbers in _limits("cpu", "cpu.max", ("cpu.cfs_quota_us", "cpu.cfs_period_us"), root):
        if len(numbers) == 2 and numbers[0] > 0 and numbers[1] > 0:
            allowed = min(allowed, numbers[0] / numbers[1])
    return allowed


def usable_cpus() -> set[int]:
    """Return the numbers of the logical processors that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def processors(cpus: int | None = None) -> int:
    """Return how many processors' time this process may use: those it may run on, or fewer where there is a quota.

    Args:
        cpus: what to count in place of the logical processors, such as the physical cores.
    """
    return max(1, math.ceil(min(cpu_quota(), len(usable_cpus()) if cpus is None else cpus)))


def memory_limit(root: Path = ROOT) -> float:
    """Return how many bytes of memory this process may use; infinity where there is no limit."""
    limits = [numbers[0] for numbers in _limits("memory", "memory.max", ("memory.limit_in_bytes",), root) if numbers]
    return min((limit for limit in limits if limit >= 0), default=math.inf)
