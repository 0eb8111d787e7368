"""`fault_layer.c` from Python: compiled once, armed in a child of a fork server, read back as a list of operations."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ForkServer, Result

SOURCE = Path(__file__).with_suffix(".c")
FOR_EVER = 2**31 - 1
GROWING = ",create,write,mkdir,link,symlink,truncate,fsync,"  # what a disk without room can refuse


@dataclass(frozen=True)
class Fault:
    """What happens to the operations `first` to `last`, counted from 1.

    Attributes:
        action: 0 nothing, they are only counted; 1 a kill before the operation; 2 a kill after half of the bytes of a
            write, or behind an operation that is none; 3 an error.
        error: errno of an error.
        operations: names of those that fail, with a comma before and behind each; "" for all.
    """

    action: int = 0
    first: int = 0
    last: int = 0
    error: int = 0
    operations: str = ""

    def __str__(self) -> str:
        if self.action < 3:
            return f"{('counted', 'killed before', 'killed in')[self.action]} operation {self.first}"
        return f"{errno.errorcode[self.error]} from operation {self.first}"


def kill(number: int) -> Fault:
    """A kill before an operation."""
    return Fault(1, number, number)


def tear(number: int) -> Fault:
    """A kill in the middle of an operation."""
    return Fault(2, number, number)


def full(number: int, error: int = errno.ENOSPC) -> Fault:
    """A disk without room, or a quota (EDQUOT), from an operation on."""
    return Fault(3, number, FOR_EVER, error, GROWING)


def broken(number: int) -> Fault:
    """One operation that the disk fails."""
    return Fault(3, number, number, errno.EIO)


def read_only(number: int) -> Fault:
    """A file system that became read-only, as some do after an error."""
    return Fault(3, number, FOR_EVER, errno.EROFS)


def missing(operation: str, error: int) -> Fault:
    """A file system that does not know an operation."""
    return Fault(3, 1, FOR_EVER, error, f",{operation},")


@dataclass(frozen=True)
class Operation:
    """A line of the log: what was done to which path (below the folder), and from where a rename came."""

    number: int
    name: str
    path: str
    source: str

    def same(self, other: Operation) -> bool:
        """The same thing done to the same file."""
        return (self.name, self.path) == (other.name, other.path)

    def __str__(self) -> str:
        path = re.sub(r"\.\d+\.tmp", ".<process>.tmp", self.path or "/")
        return f"{self.number} {self.name} {path}"


class Faults:
    """Runs targets with faults in what they do below a folder."""

    def __init__(self, build: Path) -> None:
        compiler = shutil.which("gcc") or shutil.which("cc")
        if sys.platform != "linux" or compiler is None:
            pytest.skip("the fault layer needs Linux and a C compiler")
        library = build / "fault_layer.so"
        subprocess.run(
            [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"],
            check=True,
        )
        self._log = build / "operations.log"
        self.server = ForkServer([library])

    def run(
        self, fault: Fault, watched: Path, target: Callable[..., None], *arguments: Any, **options: Any
    ) -> tuple[Result, list[Operation]]:
        """How the target ended, and what it did below `watched`."""
        self._log.unlink(missing_ok=True)
        what = (fault.action, fault.first, fault.last, fault.error, fault.operations)
        arm = ("fault_layer_arm", str(watched), str(self._log), *what)
        result = self.server.run(target, *arguments, before=arm, **options)
        found = []
        assert self._log.exists(), f"it died before it was armed: {result}"
        for line in self._log.read_text(encoding="utf-8").splitlines():
            number, name, paths = line.split(" ", 2)
            path, _, source = paths.partition(" < ")
            found.append(Operation(int(number), name, path, source))
        return result, found
