"""Signals ask a run to stop: Ctrl-C, a terminal that closes, and the signals of schedulers before they kill a job.

Before the first step a signal stops the run at once, because nothing is lost. Later the run finishes its optimizer
step, writes a checkpoint and ends (`callbacks/checkpoints.py`). A second signal stops it at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from bitnet_lit.errors import Interruption, TrainingStopped

# SLURM (--signal), Grid Engine and LSF send SIGUSR1, SIGUSR2 or SIGXCPU when the time of a job is nearly up.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


@contextlib.contextmanager
def handling(handler: Callable[[int, types.FrameType | None], None]) -> Iterator[None]:
    """Handle the signals of `STOP_SIGNALS` with `handler` while the block runs.

    A signal that the process ignores (nohup) stays ignored. Python sets handlers only in the main thread, so in another
    thread nothing is changed. A process that is forked in the block (by a DataLoader of the user's, say) is ended by
    SIGTERM, with which multiprocessing ends it, and ignores the other signals, because its parent answers them.
    """
    process = os.getpid()

    def handle(number: int, frame: types.FrameType | None) -> None:
        if os.getpid() == process:
            handler(number, frame)
        elif number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, before in previous.items():
        if before is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, before in previous.items():
            if before is not None:  # None: C code set it, and Python cannot restore it
                signal.signal(number, before)


def leave_to_parent(worker: int = 0) -> None:
    """Let a process that reads data go on when a signal asks the run to stop: its parent answers the signal.

    Terminals, schedulers, systemd and `timeout` send a signal to every process of a run. The parent finishes its step
    and validates, and needs the batches of this process, which ends after its parent. A second SIGTERM ends the process
    at once, because the first may be such a signal, and multiprocessing sends two to a process that hangs.

    The process is started inside `blocked`, so that a signal which comes while it imports waits for this call.

    Args:
        worker: number of the process, which a DataLoader gives to its `worker_init_fn`.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Block the signals of `STOP_SIGNALS` in processes that the block starts; one that arrives here waits for its end.

    multiprocessing and joblib start a process, the resource tracker, that ignores SIGINT and SIGTERM only. A scheduler
    may send SIGUSR1 to every process of a job. If it ended the tracker, the next one would print tracebacks. A process
    that reads data is started so too, and unblocks the signals once it handles them (`leave_to_parent`).
    """
    received: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # The system may give a signal to another thread, which does not block it. Python would handle it here.
        with handling(lambda number, frame: received.append(number)):
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in received:
            signal.raise_signal(number)


class StopSignals:
    """Records the signals that arrive inside its `with` block.

    A handler stops the run at once by raising an `Interruption` wherever the run is. The block ends with its
    TrainingStopped, also where a library has raised another exception in its place. Where a library has caught it, the
    run ends at its first step.

    Attributes:
        number: the signal that arrived; None before.
        is_running: whether the run does optimizer steps, so that it must finish one before it stops.
        how_to_go_on: returns what a user can do when the run stops at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_running = False
        self.how_to_go_on: Callable[[], str] = lambda: "give the same command again"
        self._handling = contextlib.ExitStack()
        self._stopped: TrainingStopped | None = None

    def __enter__(self) -> StopSignals:
        self._handling.enter_context(handling(self._request))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._handling.close()
        if self._stopped is not None and isinstance(error, Exception | Interruption):
            raise self._stopped from None

    def _request(self, number: int, frame: types.FrameType | None) -> None:
        name, is_second, self.number = signal.Signals(number).name, self.number is not None, number
        if not self.is_running:
            what = f"{name} before the first step: no step was done, give the same command again"
        elif is_second:
            what = f"{name} for the second time: stopped at once; {self.how_to_go_on()}"
        else:
            return
        self._stopped = TrainingStopped(what, 128 + number)
        raise Interruption(self._stopped)
