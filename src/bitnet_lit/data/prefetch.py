"""Batches for a GPU are read, pinned and copied by a thread of their own, ahead of the step that needs them.

The copy runs on a CUDA stream of its own, beside the kernels of the step before. The order of the batches does not
change, and the trainer still counts what it has consumed, so a batch that was read ahead is not lost to a resumed run.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

DEPTH = 2  # batches that wait on the device
_POLL_SECONDS = 0.1


class _Reader(threading.Thread):
    """Reads batches until it is stopped.

    Attributes:
        ready: batches with the events of their copies, or exceptions.
    """

    def __init__(self, batches: Iterator[Tensor], device: torch.device) -> None:
        super().__init__(name="bitnet_lit batches", daemon=True)
        self.batches, self.device = batches, device
        self.ready: queue.Queue[Any] = queue.Queue(DEPTH)
        self.stopped = threading.Event()

    def run(self) -> None:
        try:
            stream = torch.cuda.Stream(self.device)
            for batch in self.batches:
                with torch.cuda.stream(stream):
                    copy = batch.pin_memory().to(self.device, non_blocking=True)
                    done = torch.cuda.Event()
                    done.record(stream)
                if not self._put((copy, done)):
                    return
            self._put(StopIteration())
        except BaseException as error:  # raised where the batch is asked for
            self._put(error)

    def _put(self, item: Any) -> bool:
        """Wait for room and add an item; return False where the reader was stopped."""
        while not self.stopped.is_set():
            try:
                self.ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False


def prefetched(batches: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield the batches in their order, on a CUDA device, reading ahead in a thread.

    Raises:
        Exception: whatever reading a batch raised, at the place of that batch.
    """
    reader = _Reader(batches, device)
    reader.start()
    try:
        while True:
            item = reader.ready.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            batch, done = item
            stream = torch.cuda.current_stream(device)
            stream.wait_event(done)
            batch.record_stream(stream)  # its memory must not be reused before this stream has read it
            yield batch
    finally:
        reader.stopped.set()
        reader.join(timeout=5)  # it may be reading; at the end of the process it no longer runs
