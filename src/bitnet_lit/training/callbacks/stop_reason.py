"""`StopReason` says whether a run must stop before its last step: its time is up, or a signal has arrived.

Several ranks stop at the same step. So the reason is one number, and the ranks agree on the largest of theirs.
"""

from __future__ import annotations

import math
import time
from datetime import timedelta

import lightning as L
import torch

from bitnet_lit.runs.signals import StopSignals

TIME_IS_UP = 1


class StopReason:
    """Finds out after each optimizer step why the run must stop.

    Args:
        signals: the signals that ask the run to stop.
        max_time: the time after which the run ends, from `start` on; None sets no limit.
    """

    def __init__(self, signals: StopSignals, max_time: timedelta | None) -> None:
        self.signals, self.max_time = signals, max_time
        self._deadline = math.inf
        self._agreed: tuple[torch.Tensor, torch.cuda.Event] | None = None  # the largest reason, on its way to the host

    def start(self) -> None:
        """Begin to count the time."""
        if self.max_time is not None:
            self._deadline = time.monotonic() + self.max_time.total_seconds()

    def __call__(self, trainer: L.Trainer) -> int:
        """Return 0 for no reason, `TIME_IS_UP`, or a signal's number + 1. Every rank must call this method."""
        reason = TIME_IS_UP if time.monotonic() >= self._deadline else 0
        if self.signals.number is not None:
            reason = self.signals.number + 1
        return self._largest(trainer, reason) if trainer.world_size > 1 else reason

    def _largest(self, trainer: L.Trainer, reason: int) -> int:
        """Return the largest reason of all ranks. On GPUs it is that of the step before, so that no step waits."""
        largest = torch.full((), reason, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        if largest.device.type != "cuda":
            return int(largest)
        before, copy, done = self._agreed, torch.empty_like(largest, device="cpu", pin_memory=True), torch.cuda.Event()
        copy.copy_(largest, non_blocking=True)
        done.record()
        self._agreed = copy, done
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])
