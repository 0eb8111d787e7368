"""Signals that ask a run to stop: Ctrl-C, the end of a terminal, and what schedulers send before they kill.

Before the first step nothing is lost by stopping at once. Later the signal is only noted, and the run ends behind the
optimizer step it is in, with a checkpoint (`callbacks/checkpoints.py`). The second signal stops it at once.
"""

from __future__ import annotations

import signal
import threading
import types
from typing import Any

from bitnet_lit.errors import TrainingStopped

# SIGUSR1, SIGUSR2 and SIGXCPU: what SLURM (--signal), Grid Engine and LSF send when the time is nearly up.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class StopSignals:
    """Catches the signals while it is entered; a signal that the caller ignores (nohup) stays ignored.

    Attributes:
        number: the signal that came; None so far.
        is_running: whether steps are done, so that stopping must wait for the end of one.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_running = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere signals are somebody else's business
            self._previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.take()
        return self

    def take(self) -> None:
        """Catch the signals (again: Lightning sets its own handlers)."""
        for number, previous in self._previous.items():
            if previous is not signal.SIG_IGN:
                signal.signal(number, self._request)

    def __exit__(self, *exception: object) -> None:
        for number, previous in self._previous.items():
            if previous is not None:  # None: set by C code, which Python cannot put back
                signal.signal(number, previous)
        self._previous = {}

    def _request(self, number: int, frame: types.FrameType | None) -> None:
        name, status = signal.Signals(number).name, 128 + number
        if not self.is_running:
            raise TrainingStopped(
                f"{name} before the first step: no step was done, give the same command again", status
            )
        if self.number is not None:
            raise TrainingStopped(f"{name} for the second time: stopped at once; the last checkpoint is kept", status)
        self.number = number
