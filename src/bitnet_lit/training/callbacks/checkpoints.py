"""Checkpoints for resuming: `last.ckpt` and `best.ckpt`, each either the old file or the new one.

A checkpoint is written at the end of a validation, where the state of the loop is simplest, and on request in
between. Signals ask for one too: on Ctrl-C or SIGTERM the run finishes the optimizer step it is in, saves, and stops.
"""

from __future__ import annotations

import os
import signal
import types
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from bitnet_lit.errors import TrainingStopped

LAST, BEST = "last.ckpt", "best.ckpt"


def save_checkpoint(trainer: L.Trainer, path: Path) -> None:
    """Write through a temporary name; every rank calls it."""
    temporary = path.with_name(f".{path.name}.tmp")
    trainer.save_checkpoint(temporary)
    if trainer.is_global_zero:
        os.replace(temporary, path)
    trainer.strategy.barrier()


class Checkpoints(Callback):
    """Keeps the last state and the one with the lowest validation loss.

    Attributes:
        best_loss: lowest val/loss so far, in nats; inf before the first validation.
        improved: whether the last validation was the best so far.
    """

    def __init__(self, folder: Path, every_n_steps: int | None) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.best_loss = float("inf")
        self.improved = False
        self._signal: int | None = None
        self._previous_handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)

    # After on_fit_start, because Lightning sets its own handlers in between.
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous_handlers[number] = signal.signal(number, self._request_stop)
            except ValueError:  # not the main thread: a notebook's or a test's business
                return

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _request_stop(self, number: int, frame: types.FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt  # asked twice: at once
        self._signal = number

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = self._signal is not None
        if trainer.world_size > 1:  # a signal may reach the ranks at different steps
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        at_end = trainer.global_step >= trainer.max_steps
        if at_end:
            trainer.should_stop = True  # Lightning then validates once more, wherever the interval stands
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        validates = trainer.val_check_batch and (batch_idx + 1) % trainer.val_check_batch == 0
        if stop or (due and not validates and not at_end):
            save_checkpoint(trainer, self.folder / LAST)
        if stop:
            name = signal.Signals(self._signal or signal.SIGTERM).name
            raise TrainingStopped(
                f"{name} at step {trainer.global_step} of {trainer.max_steps}: saved; go on with "
                f"python -m bitnet_lit.train resume={self.folder.parent}",
                status=128 + (self._signal or signal.SIGTERM),
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss", torch.tensor(float("nan"))).item()
        self.improved = loss < self.best_loss
        self.best_loss = min(loss, self.best_loss) if self.improved else self.best_loss
        save_checkpoint(trainer, self.folder / LAST)
        if self.improved and trainer.is_global_zero:
            self._keep_as_best()

    def _keep_as_best(self) -> None:
        temporary = self.folder / f".{BEST}.tmp"
        temporary.unlink(missing_ok=True)
        os.link(self.folder / LAST, temporary)  # the same bytes under a second name: last.ckpt is replaced, not changed
        os.replace(temporary, self.folder / BEST)

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss = state_dict["best_loss"]
