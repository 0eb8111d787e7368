"""Failures from outside end a run with one line that says what happened and how to go on.

Such failures are a full disk, data that cannot be read any more, an error of the GPU, and a process of the run that
died.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bitnet_lit.errors import DataError, Diverged, GpuError, TrainingStopped, UserError, disk_errors, one_line
from bitnet_lit.gpu_errors import is_gpu_error, note, wants_traceback, without_boilerplate
from bitnet_lit.runs.folder import CHECKPOINTS, LAST
from bitnet_lit.runs.go_on import command_to_resume

_WORKER_DIED = re.compile(r"DataLoader worker \(pid.*?\) (is killed by signal: [\w ]+|exited unexpectedly)")
_NO_METRIC = re.compile(
    r"Early stopping conditioned on metric `(.*?)` which is not available.*any of the following: (.*)"
)
_CONNECTION = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|Socket|TCPStore", re.I)


def what_is_kept(run_dir: Path) -> str:
    """Return the end of an error text: which checkpoint is kept, and how to go on."""
    if (run_dir / CHECKPOINTS / LAST).exists():
        return f"the last checkpoint is kept: go on with {command_to_resume(run_dir)}"
    return "there is no checkpoint yet: start again"


@contextlib.contextmanager
def in_one_line(run_dir: Callable[[], Path], world_size: int, rank: int) -> Iterator[None]:
    """Wrap the training of a run: turn failures into errors of one line, with what is kept at the end of the line.

    Args:
        run_dir: returns the run folder. It is a function because the ranks agree on the folder only after they have
            connected.

    Raises:
        UserError: the disk is full, or the data cannot be read any more. A subclass of UserError stays that subclass.
        GpuError: the GPU or its driver reports an error. With CUDA_LAUNCH_BLOCKING=1 the error is raised as it is,
            because its traceback then shows the place.
        TrainingStopped: a process of the run died.
    """
    try:
        with disk_errors(f"run_dir={run_dir()}", full="make room"):
            yield
    except (UserError, DataError, Diverged) as error:
        raise type(error)(f"{error}; {what_is_kept(run_dir())}") from error
    except TrainingStopped:  # It is a RuntimeError too, and its text is complete.
        raise
    except RuntimeError as error:
        if is_gpu_error(error) and not isinstance(error, torch.distributed.DistError):
            if wants_traceback():
                raise
            note(error)
            raise GpuError(
                f"{without_boilerplate(error)}; {what_is_kept(run_dir())}. If it comes again, CUDA_LAUNCH_BLOCKING=1 "
                "shows where, and quant.kernel=reference trains without kernels of this project"
            ) from error
        text = one_line(error)
        if died := _WORKER_DIED.search(text):
            raise TrainingStopped(
                f"a process that reads the data {died[1]} (out of memory, or a shard changed while it was read?); "
                f"{what_is_kept(run_dir())}"
            ) from error
        if world_size > 1 and (isinstance(error, torch.distributed.DistError) or _CONNECTION.search(text)):
            raise TrainingStopped(
                f"rank {rank} of {world_size} lost the others (was one killed, or out of memory?); "
                f"{what_is_kept(run_dir())}"
            ) from error
        if unknown := _NO_METRIC.search(text):
            raise UserError(
                f"callbacks.extra: EarlyStopping's monitor={unknown[1]} is not logged: give one of "
                f"{unknown[2].replace('`', '')}; {what_is_kept(run_dir())}"
            ) from error
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] == "wandb":
            raise UserError(
                f"logger=wandb: {error}: run wandb login, set WANDB_MODE=offline, or choose another logger="
            ) from error
        raise
