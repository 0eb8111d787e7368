"""Runs sweeps as processes, several at once: each on one GPU, which it may share with others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plan import Sweep

from bitnet_lit.control_groups import processors

GRACE_SECONDS = 90.0  # for runs to save after SIGTERM


def _end_with_parent() -> None:
    """Ask Linux to send SIGTERM to this process when its parent dies, so that a killed study leaves none behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG of sys/prctl.h


@dataclass
class Running:
    """A sweep that runs.

    Attributes:
        place: the index of its GPU.
        jobs: how many runs it has side by side.
    """

    sweep: Sweep
    process: subprocess.Popen[bytes]
    place: int
    jobs: int
    began: float


class Pool:
    """The processes of the study.

    Args:
        gpus: names of the GPUs, as CUDA_VISIBLE_DEVICES has them; empty for the CPU.
        room: runs side by side on each.
    """

    def __init__(self, gpus: Sequence[str], room: int) -> None:
        self.gpus, self.room = list(gpus), room
        self.running: list[Running] = []

    def place_for(self, sweep: Sweep, jobs: int) -> tuple[int, int] | None:
        """Return a GPU that has room for a sweep, and for how many of its runs at once; None where none has.

        Args:
            jobs: how many runs are left.
        """
        if self.running and (sweep.is_alone or any(one.sweep.is_alone for one in self.running)):
            return None
        free = {
            place: self.room - sum(one.jobs for one in self.running if one.place == place)
            for place in range(max(1, len(self.gpus)))
        }
        place = max(free, key=lambda place: free[place])
        wanted = min(jobs, self.room)
        return (place, wanted) if free[place] >= wanted else None

    def start(self, sweep: Sweep, command: Sequence[str], place: int, jobs: int, log: Path) -> None:
        """Start the command of a sweep on a GPU. What it prints is appended to a file."""
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if self.gpus:  # each run takes a share of the processors, for compilation too
            share = str(max(1, processors() // (len(self.gpus) * self.room)))
            environment |= {"CUDA_VISIBLE_DEVICES": self.gpus[place], "OMP_NUM_THREADS": share}
            environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", share)
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is the study's
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self.running.append(Running(sweep, process, place, jobs, time.monotonic()))

    def ended(self) -> list[Running]:
        """Return the sweeps whose process has ended since the last call."""
        over = [one for one in self.running if one.process.poll() is not None]
        self.running = [one for one in self.running if one not in over]
        return over

    def stop(self) -> list[Running]:
        """Ask every sweep to save and end, wait until they have, and return them."""
        for one in self.running:
            one.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for one in self.running:
            try:
                one.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one.process.pid, signal.SIGKILL)
                one.process.wait()
        return self.ended()
