"""The jobs of a sweep (`-m`), in one process after the other or side by side (launcher=joblib).

A job that fails notes its reason and lets the others run. A signal that asks to stop ends the sweep: jobs that run save
and end (`runs/signals.py`), no other one begins. What the processes of a sweep tell each other lies in its folder:

    <sweep folder>/.stop        the number of the signal that ended the sweep
    <sweep folder>/.refused     jobs whose folder holds another run, where nothing may be written: a line each
    <job folder>/error.txt      why a job failed
"""

from __future__ import annotations

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

from bitnet_lit.errors import ModelError, ParityError, TrainingStopped, UserError, is_out_of_memory, one_line
from bitnet_lit.runs.folder import ERROR_NAME, is_taken
from bitnet_lit.runs.ranks import rank
from bitnet_lit.runs.signals import handling

STOP_NAME, REFUSED_NAME = ".stop", ".refused"
_POLL_SECONDS, _GRACE_SECONDS = 0.5, 2.0


def stop_number(sweep_dir: Path) -> int | None:
    """The signal that ended a sweep; None where none did."""
    try:
        return int((sweep_dir / STOP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def request_stop(sweep_dir: Path, number: int) -> None:
    """Let no other job of a sweep begin, and those in other processes end."""
    sweep_dir.mkdir(parents=True, exist_ok=True)
    (sweep_dir / STOP_NAME).write_text(str(number), encoding="utf-8")


class StopHandlers:
    """Signal handlers of the process that a sweep was started in, for the time between and beside its jobs."""

    in_job = False  # a job runs in this process and does not hear signals itself yet

    def __init__(self, sweep_dir: Path) -> None:
        self.sweep_dir = sweep_dir
        self._handling = contextlib.ExitStack()

    def install(self) -> None:
        self._handling.enter_context(handling(self._request))

    def remove(self) -> None:
        self._handling.close()

    def _request(self, number: int, frame: types.FrameType | None) -> None:
        if stop_number(self.sweep_dir) is not None:
            raise KeyboardInterrupt  # asked twice: at once
        request_stop(self.sweep_dir, number)
        if StopHandlers.in_job:
            name = signal.Signals(number).name
            raise TrainingStopped(f"{name} before the first step: no step was done", 128 + number)


@contextlib.contextmanager
def _signalled_by(sweep_dir: Path) -> Iterator[None]:
    """Pass the signal of the process that started the sweep on to the job that runs in this one.

    A terminal and most schedulers send a signal to every process themselves. A second one would stop the job at once,
    without saving; so it is passed on only where none has come by itself.
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


def run_job(work: Callable[[], Any], folder: Path, sweep_dir: Path, is_main_process: bool) -> Any:
    """One job of a sweep; a failure is noted, not raised, so that the others go on.

    Args:
        work: composes the job's config and runs it.
        folder: the job's.
        is_main_process: whether this is the process that the sweep was started in, which has the signals.

    Returns:
        What the job returns; infinity where it failed.
    """
    is_foreign = is_taken(folder)  # then the job is refused, and so is everything that would be written there
    try:
        if (number := stop_number(sweep_dir)) is not None:
            raise TrainingStopped(f"not started: {signal.Signals(number).name} ended the sweep")
        StopHandlers.in_job = True
        with contextlib.nullcontext() if is_main_process else _signalled_by(sweep_dir):
            return work()
    except Exception as error:
        if isinstance(error, TrainingStopped) and error.status > 128:
            request_stop(sweep_dir, error.status - 128)
        told = isinstance(error, UserError | TrainingStopped | ParityError | ModelError | OSError)
        if not told and not is_out_of_memory(error):
            traceback.print_exc()
        line = f"{type(error).__name__}: {one_line(error)}"
        print(f"error: {folder}: {line}", file=sys.stderr)
        if rank():  # the first one notes it
            return float("inf")
        folder.mkdir(parents=True, exist_ok=True)
        if is_foreign:
            with (sweep_dir / REFUSED_NAME).open("a", encoding="utf-8") as file:
                file.write(f"{os.path.relpath(folder, sweep_dir)}\t{line}\n")
        else:
            (folder / ERROR_NAME).write_text(line + "\n", encoding="utf-8")
        return float("inf")
    finally:
        StopHandlers.in_job = False
