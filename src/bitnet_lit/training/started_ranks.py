"""The ranks that Lightning starts beside this process, and what it leaves of them here.

Lightning expects that the process ends with the run. It says in the environment which rank this is, and a second
Trainer would take that for a launcher's word and start no ranks; it keeps the process group; and a thread of it kills
this process when a rank has ended with an error. In a sweep, or in a notebook, another run follows.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import lightning as L
import torch

_WRITTEN = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
_GRACE_SECONDS = 20.0  # a rank whose run has ended leaves Python within a few


@contextlib.contextmanager
def left_as_found(trainer: L.Trainer) -> Iterator[None]:
    """Around `trainer.fit`: behind it the ranks that it started have ended, and this process is as it was before."""
    environment, threads = {name: os.environ.get(name) for name in _WRITTEN}, torch.get_num_threads()
    try:
        yield
    finally:
        started: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        ranks = started.copy()
        started.clear()  # Lightning's thread looks after nobody any more
        for process in ranks:
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:  # it waits for this rank, which has failed
                process.kill()
                process.wait()
        if ranks:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            torch.set_num_threads(threads)
