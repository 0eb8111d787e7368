"""The jobs of a sweep are given to Hydra's launcher, and once more those that another job's GPU error took along.

launcher=joblib runs jobs in a pool of processes. A process whose GPU is lost (`gpu_errors.py`) leaves further jobs
alone, and one that is aborted breaks the whole pool: joblib ends the processes beside it too. Jobs that ended so have
told no reason. They begin again in new processes, or go on from their checkpoints. The job with the error has failed:
the next start of the sweep tries it again.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher

from bitnet_lit.errors import TrainingStopped, without_class_name
from bitnet_lit.gpu_errors import names_gpu_error
from bitnet_lit.overrides import quoted
from bitnet_lit.runs.folder import ERROR_NAME
from bitnet_lit.runs.job_folder import State, is_stop, state
from bitnet_lit.runs.signals import blocked
from bitnet_lit.runs.sweep import stop_number

# An error that a process does not survive ends it within seconds: when it frees its tensors, or begins its next job.
RECENT_NS = 60 * 10**9


@dataclass(frozen=True)
class Planned:
    """A job of a sweep that may run.

    Attributes:
        overrides: of the job, in Hydra's grammar.
        folder: its folder; None where the user's `hydra.sweep.subdir` will name it.
        state: how far it is.
    """

    overrides: list[str]
    folder: Path | None
    state: State

    def launched(self, sweep_dir: Path) -> list[str]:
        """Return the overrides with which a launcher starts the job."""
        if self.folder is None:
            return self.overrides
        return [*self.overrides, f"hydra.sweep.subdir={quoted(self.folder.relative_to(sweep_dir).as_posix())}"]


class ProcessDied(TrainingStopped):
    """Reports that a process of a sweep died and told no reason, so that joblib ended the others too."""


def _signals(error: BrokenProcessPool) -> set[str]:
    """Return the names of the signals that ended processes of a pool, without that by which joblib ends the others."""
    return {*re.findall(r"SIG[A-Z]+", str(error))} - {"SIGTERM"}


def _was_killed(error: BrokenProcessPool) -> bool:
    """Return whether the system killed a process. One that ends of an error of its own has another status."""
    return _signals(error) == {"SIGKILL"}


def why_it_died(error: BrokenProcessPool, reason: str | None = None) -> ProcessDied:
    """Return the error that says why a process of a sweep died.

    Args:
        reason: of a job that failed just before; None where no job told one.
    """
    signals = _signals(error) - {"SIGKILL"}
    if reason is not None and not _was_killed(error):
        return ProcessDied(f"a process of the sweep died, most likely of the error of {reason}")
    if signals:
        return ProcessDied(f"a process of the sweep was ended by {', '.join(sorted(signals))}: its last lines say more")
    return ProcessDied("a process of the sweep was killed, most likely for memory: take fewer (hydra.launcher.n_jobs)")


def _told(job: Planned) -> tuple[int, str] | None:
    """Return when a job failed, in nanoseconds, and the line that says why; None where it has not."""
    if job.folder is None:
        return None
    path = job.folder / ERROR_NAME
    try:
        return path.stat().st_mtime_ns, path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _end_processes() -> None:
    """End the processes that joblib keeps for the next jobs: one of them has lost its GPU."""
    loky = sys.modules.get("joblib.externals.loky")
    if loky is not None:
        loky.get_reusable_executor().shutdown(wait=True)


def _start_resource_tracker(launcher: Launcher) -> None:
    """Start joblib's resource tracker, if joblib will run the jobs, so that no signal to all processes ends it."""
    if type(launcher).__name__ == "JoblibLauncher":
        from joblib.externals.loky.backend import resource_tracker

        with blocked():
            resource_tracker.ensure_running()


def launch(launcher: Launcher, jobs: Sequence[Planned], sweep_dir: Path, first: int) -> list[Any]:
    """Run jobs, and run those again that ended because of the GPU error of another one.

    Args:
        first: the number of the first job, counted from the start of the sweep.

    Returns:
        What the launcher returns, for the jobs that did not have to run again.

    Raises:
        ProcessDied: a process died for a reason that another try would most likely meet again.
    """
    _start_resource_tracker(launcher)
    waiting = list(jobs)
    results: list[Any] = []
    while True:
        before = [_told(job) for job in waiting]
        broken = None
        try:
            results += launcher.launch([job.launched(sweep_dir) for job in waiting], initial_job_idx=first)
        except BrokenProcessPool as error:
            broken = error
        now, after = time.time_ns(), [_told(job) for job in waiting]
        new = [(told, job) for job, was, told in zip(waiting, before, after, strict=True) if told and told != was]
        failed = sorted(new, key=lambda one: one[0])  # the first one first
        is_killed = broken is not None and _was_killed(broken)  # then an error of the GPU may be hours old
        by_gpu = [job for told, job in failed if names_gpu_error(told[1]) and not is_killed]
        if by_gpu:
            _end_processes()
        left = [
            job
            for job, was, told in zip(waiting, before, after, strict=True)
            if told in (None, was) and job.folder is not None and state(job.folder) not in (State.DONE, State.RUNNING)
        ]
        if left and by_gpu and stop_number(sweep_dir) is None:
            print(
                f"sweep: {by_gpu[0].folder}: its GPU error ended {len(left)} other job{'s' * (len(left) > 1)}: they go "
                "on in new processes",
                file=sys.stderr,
            )
            waiting = left
            continue
        if broken is None or (by_gpu and not left):
            return results  # where a process died, its job's error.txt names the GPU's error
        unknown = [
            f"{job.folder}: {told[1]}"
            for told, job in failed
            if now - told[0] < RECENT_NS and without_class_name(told[1]) == told[1] and not is_stop(told[1])
        ]
        raise why_it_died(broken, unknown[-1] if unknown else None) from None
