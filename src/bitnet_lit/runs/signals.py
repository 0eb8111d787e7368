"""Signals that ask a run to stop: Ctrl-C, the end of a terminal, and what schedulers send before they kill.

Before the first step nothing is lost by stopping at once. Later the signal is only noted, and the run ends behind the
optimizer step it is in, with a checkpoint (`callbacks/checkpoints.py`). The second signal stops it at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from bitnet_lit.errors import TrainingStopped

# SIGUSR1, SIGUSR2 and SIGXCPU: what SLURM (--signal), Grid Engine and LSF send when the time is nearly up.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


@contextlib.contextmanager
def handling(handler: Callable[[int, types.FrameType | None], None]) -> Iterator[Callable[[], None]]:
    """Let `handler` have the signals of `STOP_SIGNALS`; one that the caller ignores (nohup) stays ignored.

    Only the main thread can set handlers: in another one nothing happens, and signals are somebody else's business.

    Returns:
        A function that sets the handlers again, for when somebody has set others.
    """
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def take() -> None:
        for number, before in previous.items():
            if before is not signal.SIG_IGN:
                signal.signal(number, handler)

    take()
    try:
        yield take
    finally:
        for number, before in previous.items():
            if before is not None:  # None: set by C code, which Python cannot put back
                signal.signal(number, before)


class StopSignals:
    """Notes the signals that come while it is entered.

    Attributes:
        number: the signal that came; None so far.
        is_running: whether steps are done, so that stopping must wait for the end of one.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_running = False
        self._handling = contextlib.ExitStack()
        self._take: Callable[[], None] = lambda: None

    def __enter__(self) -> StopSignals:
        self._take = self._handling.enter_context(handling(self._request))
        return self

    def take(self) -> None:
        """Catch the signals (again: Lightning sets its own handlers)."""
        self._take()

    def __exit__(self, *exception: object) -> None:
        self._handling.close()

    def _request(self, number: int, frame: types.FrameType | None) -> None:
        name, status = signal.Signals(number).name, 128 + number
        if not self.is_running:
            raise TrainingStopped(
                f"{name} before the first step: no step was done, give the same command again", status
            )
        if self.number is not None:
            raise TrainingStopped(f"{name} for the second time: stopped at once; the last checkpoint is kept", status)
        self.number = number
