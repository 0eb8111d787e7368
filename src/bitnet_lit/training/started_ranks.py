"""Lightning starts the other ranks of a distributed run. This module removes what it leaves behind in this process.

Lightning expects the process to end with the run, but in a sweep or a notebook another run follows. Lightning leaves
three things. Its environment variables name a rank, so the next Trainer would believe that a launcher started the ranks
and would start none. The process group stays open. And a thread kills this process if a rank ends with an error.

NCCL closes a process group on all ranks together: a rank that leaves Python waits there for the others. So this process
closes the group of a run that has succeeded before it waits for its ranks to end.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import lightning as L
import torch

_WRITTEN = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
_GRACE_SECONDS = 20.0  # a rank whose run has ended leaves Python within a few seconds


@contextlib.contextmanager
def left_as_found(trainer: L.Trainer) -> Iterator[None]:
    """Wrap `trainer.fit`: at the end the ranks that it started have ended, and this process is as it was before."""
    environment, threads = {name: os.environ.get(name) for name in _WRITTEN}, torch.get_num_threads()
    has_succeeded = False
    try:
        yield
        has_succeeded = True
    finally:
        started: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        ranks = started.copy()
        if ranks and has_succeeded:
            _close_group()
        started.clear()  # Lightning's thread then watches no rank any more
        for rank, process in enumerate(ranks, 1):
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:  # it may be waiting for this rank, which has failed
                if has_succeeded:
                    print(f"note: process {rank} of the run did not end by itself and was killed", file=sys.stderr)
                process.kill()
                process.wait()
        if ranks:
            _close_group()
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            torch.set_num_threads(threads)


def _close_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
