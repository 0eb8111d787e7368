"""A sweep (`-m`) runs several jobs, one after the other or in parallel processes (launcher=joblib).

A job that fails writes its error to a file, and the other jobs go on; the next start of the sweep tries it again. A
signal ends the sweep: running jobs save and end (`runs/signals.py`), and no other job begins. The processes of a sweep
communicate through files in its folder:

    <sweep folder>/.stop        the number of the signal that ended the sweep
    <sweep folder>/.refused     one line for each job whose folder holds another run, where nothing may be written
    <job folder>/error.txt      why a job failed, or at which step a signal stopped it
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bitnet_lit import gpu_errors
from bitnet_lit.entry_point import interrupt
from bitnet_lit.errors import MESSAGES, Interruption, TrainingStopped, is_out_of_memory, without_class_name
from bitnet_lit.runs.folder import ERROR_NAME, is_taken
from bitnet_lit.runs.ranks import rank
from bitnet_lit.runs.signals import handling

STOP_NAME, REFUSED_NAME = ".stop", ".refused"
RUNS_ELSEWHERE = "runs in another process"  # what the table says of such a job
_POLL_SECONDS, _GRACE_SECONDS = 0.5, 2.0


def stop_number(sweep_dir: Path) -> int | None:
    """Return the number of the signal that ended a sweep, or None."""
    try:
        return int((sweep_dir / STOP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def request_stop(sweep_dir: Path, number: int) -> None:
    """Ask a sweep to stop: no other job begins, and jobs in other processes end."""
    sweep_dir.mkdir(parents=True, exist_ok=True)
    (sweep_dir / STOP_NAME).write_text(str(number), encoding="utf-8")


class StopHandlers:
    """Handles signals in the process that the sweep was started in, whenever no job of that process handles them."""

    in_job = False  # whether a job runs in this process; signals come here until the job sets its own handlers
    stopped: TrainingStopped | None = None  # what a signal raised in it; a library may raise another in its place

    def __init__(self, sweep_dir: Path) -> None:
        self.sweep_dir = sweep_dir
        self._handling = contextlib.ExitStack()

    def install(self) -> None:
        self._handling.enter_context(handling(self._request))

    def remove(self) -> None:
        self._handling.close()

    def _request(self, number: int, frame: types.FrameType | None) -> None:
        if stop_number(self.sweep_dir) is not None:
            interrupt(number)  # the second signal stops the sweep at once
        request_stop(self.sweep_dir, number)
        if StopHandlers.in_job:
            name = signal.Signals(number).name
            StopHandlers.stopped = TrainingStopped(f"{name} before the first step: no step was done", 128 + number)
            raise Interruption(StopHandlers.stopped)


@contextlib.contextmanager
def _signalled_by(sweep_dir: Path) -> Iterator[None]:
    """Wrap a job in a process of joblib: send it the signal that the sweep's first process received.

    A terminal and most schedulers send a signal to every process. A second signal would stop the job at once, without
    saving. So the signal is sent only if this process has not received one within `_GRACE_SECONDS`.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            number = stop_number(sweep_dir)
            if number is not None:
                if not select.select([reading], [], [], _GRACE_SECONDS)[0] and not ended.is_set():
                    os.kill(os.getpid(), number)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        signal.set_wakeup_fd(previous)
        os.close(reading)
        os.close(writing)


def run_job(work: Callable[[], Any], folder: Path, sweep_dir: Path, is_main_process: bool, is_own: bool = False) -> Any:
    """Run one job of a sweep. An error is written to a file and not raised, so that the other jobs go on.

    Args:
        work: composes the config of the job and runs it.
        folder: the folder of the job.
        is_main_process: whether this is the process that the sweep was started in, which handles the signals.
        is_own: whether results in the folder are those of this job, from an earlier start of the sweep.

    Returns:
        What the job returns; infinity where it failed, or where this process has lost its GPU and leaves the job to
        another process.
    """
    if gpu_errors.is_lost() and not is_main_process:
        print(f"sweep: {folder}: not started: this process has lost its GPU", file=sys.stderr)
        return float("inf")
    is_foreign = not is_own and is_taken(
        folder
    )  # the folder is another run's: the job will be refused and must not write there
    try:
        if (number := stop_number(sweep_dir)) is not None:
            print(f"sweep: {folder}: not started: {signal.Signals(number).name} ended the sweep", file=sys.stderr)
            return float("inf")
        if gpu_errors.is_lost():
            raise TrainingStopped(
                "not started: the GPU error of an earlier job took the GPU from this process: the same line again "
                "starts this job"
            )
        StopHandlers.in_job = True
        with contextlib.nullcontext() if is_main_process else _signalled_by(sweep_dir):
            return work()
    except (Exception, Interruption) as raised:
        error = StopHandlers.stopped or (raised.stopped if isinstance(raised, Interruption) else raised)
        is_stopped = isinstance(error, TrainingStopped) and error.status > 128
        if isinstance(error, TrainingStopped) and is_stopped:
            if "SUBMITIT_EXECUTOR" in os.environ:  # the signal is for this job alone
                signal.raise_signal(error.status - 128)  # submitit's handler puts the job into the queue again
            else:
                request_stop(sweep_dir, error.status - 128)
        is_known = isinstance(error, (*MESSAGES, OSError)) or is_out_of_memory(error)
        if not is_known and (gpu_errors.wants_traceback() or not gpu_errors.is_gpu_error(error)):
            traceback.print_exc()
        gpu_errors.note(error)
        if gpu_errors.is_lost() and not is_main_process:
            atexit.register(gpu_errors.leave, 1)
        line = f"{type(error).__name__}: {gpu_errors.without_boilerplate(error)}"
        if is_stopped:
            line = without_class_name(line)
        print(f"{'sweep' if is_stopped else 'error'}: {folder}: {without_class_name(line)}", file=sys.stderr)
        if rank():  # only rank 0 writes the error
            return float("inf")
        with contextlib.suppress(OSError):  # the disk is full: the line is on the screen, and other jobs may run
            folder.mkdir(parents=True, exist_ok=True)
            if is_foreign:
                with (sweep_dir / REFUSED_NAME).open("a", encoding="utf-8") as file:
                    file.write(f"{os.path.relpath(folder, sweep_dir)}\t{line}\n")
            else:
                (folder / ERROR_NAME).write_text(line + "\n", encoding="utf-8")
        return float("inf")
    finally:
        StopHandlers.in_job, StopHandlers.stopped = False, None
