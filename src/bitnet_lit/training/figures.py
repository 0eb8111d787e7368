"""Figures of optimizer steps, read from the device without waiting for it.

Reading a number from a GPU stops the host until the GPU has done everything that it was given, and then the GPU waits
for the host. So the figures of a logged step are copied in the background, and read when they have arrived, which is
some steps later.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

Figure = Tensor | float | Callable[[], float]
"""A figure of a step: a number, a tensor of shape () on the device, or a function that gives the number later."""


class Moment:
    """A point in the work of a device. On a GPU it is reached later than the host passes it."""

    def __init__(self, device: torch.device) -> None:
        self._seconds = time.perf_counter()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def seconds_since(self, earlier: Moment) -> float:
        """Return the seconds from an earlier moment to this one, both of which the device has reached."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        return earlier._event.elapsed_time(self._event) / 1000

    def is_reached(self) -> bool:
        """Return whether the device has done the work before this moment."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Wait until the device has done the work before this moment."""
        if self._event is not None:
            self._event.synchronize()


class StepFigures:
    """The figures of one optimizer step, on their way from the device to the host.

    Attributes:
        step: number of optimizer steps up to and with this one.
    """

    def __init__(self, step: int, figures: dict[str, Figure], device: torch.device) -> None:
        self.step = step
        self._figures = dict(figures)
        self._names = [name for name, figure in figures.items() if isinstance(figure, Tensor)]
        tensors = [figures[name] for name in self._names]
        # Elsewhere (MPS) there is no event that says when a copy in the background is done.
        in_background = device.type == "cuda"
        on_device = [tensor.to(device, torch.float32, non_blocking=in_background) for tensor in tensors]  # type: ignore[union-attr]
        self._values = torch.empty(len(tensors), pin_memory=in_background)
        if tensors:
            self._values.copy_(torch.stack(on_device), non_blocking=in_background)
        self._moment = Moment(device)

    def has_arrived(self) -> bool:
        """Return whether `read` would not wait."""
        return self._moment.is_reached()

    def read(self) -> dict[str, float]:
        """Return the figures as numbers. Wait for the device if it has not done the step yet."""
        self._moment.wait()
        values = dict(zip(self._names, self._values.tolist(), strict=True))
        return {
            name: values[name] if name in values else float(figure() if callable(figure) else figure)
            for name, figure in self._figures.items()
        }
