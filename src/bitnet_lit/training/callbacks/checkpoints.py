"""When a run saves, and when it ends.

A checkpoint is the point behind which nothing is lost: everything that the step before it wrote (rows, samples) is on
the disk by then, and everything that follows from it (best.ckpt, the model folders, metrics.json) can be made from it
again. So a run that was killed anywhere goes on like this: what was written behind the checkpoint is dropped, what the
checkpoint still owed is made, and training goes on.

A run ends at its last step, when its time is up, or when a callback of the user's own sets `trainer.should_stop`
(EarlyStopping). Whatever ends it, the last validation takes the whole split.

Checkpoints are written at the end of a validation, every `every_n_steps`, and when the run is asked to stop (a signal,
or data that can no longer be read). One that was written where a validation was due and had not run yet says so; the
resumed run validates first.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from bitnet_lit.checkpoints.formats.model_folder import trained_step
from bitnet_lit.errors import DataError, Diverged, TrainingStopped, UserError
from bitnet_lit.runs.folder import BEST, LAST, MODEL
from bitnet_lit.runs.signals import StopSignals
from bitnet_lit.training.checkpoint_file import check_plain, link_checkpoint, read_checkpoint
from bitnet_lit.training.loggers import CsvLogger

FIGURES = ("val/", "train/loss", "perf/", "ternary/")
_TIME_IS_UP = 1  # reasons to stop, as one number that the ranks agree on: 0 none, a signal's number + 1


class Checkpoints(Callback):
    """Keeps the last state and the one with the lowest validation loss; ends the run.

    Args:
        steps: optimizer steps of the run.
        max_time: after which the run validates, saves and ends; None: no limit.
        identity: what makes the run what it is, kept in each checkpoint (see `identity.py`).
        validates_part: whether validations inside the run take a part of the split.
        others: `callbacks.extra`: a run that one of them ended goes on only when they were changed.

    Attributes:
        best_loss: lowest val/loss so far, in nats; inf before the first validation.
        best_step: the step it was measured at; None before the first validation.
        improved: whether the last validation was the best so far.
        figures: what the last validation and the last step measured.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int | None,
        steps: int,
        max_time: timedelta | None,
        signals: StopSignals,
        csv: CsvLogger,
        identity: dict[str, Any],
        validates_part: bool,
        others: dict[str, Any],
    ) -> None:
        self.folder, self.every_n_steps, self.steps, self.max_time = folder, every_n_steps, steps, max_time
        self.signals, self.csv, self.identity = signals, csv, identity
        self.best_loss, self.improved = math.inf, False
        self.best_step: int | None = None
        self.figures: dict[str, float] = {}
        self.validated_step: int | None = None
        self.saved_step: int | None = None
        self.validates_part, self.others = validates_part, others
        self._validated_all = False
        self._stopped_by: dict[str, Any] | None = None  # `others`, where one of them has ended the run
        self._ends, self._stops_behind_step = False, False
        self._was_restored = False
        self._deadline = math.inf

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)  # torchrun's ranks do not know the first one's yet
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.take()
        self.signals.is_running = True
        if self.max_time is not None:
            self._deadline = time.monotonic() + self.max_time.total_seconds()
        for callback in self._callbacks(trainer):
            check_plain(callback.state_dict(), f"the state_dict of {type(callback).__name__}")
        if trainer.global_step >= self.steps or (self._stopped_by is not None and self._stopped_by == self.others):
            self._end(trainer)
        if not self._was_restored:
            return
        self.saved_step = trainer.global_step
        if trainer.is_global_zero and self.best_step is not None:
            self._restore_best(trainer.global_step)
        self.best_loss, self.best_step = trainer.strategy.broadcast((self.best_loss, self.best_step))
        if self._owes_whole_validation(trainer) or (
            self.validated_step != trainer.global_step and self._validates(trainer)
        ):
            self._validate(trainer)
        elif self.validated_step == trainer.global_step and not self._validates(trainer):
            # A validation between two regular ones: Lightning has saved its count of steps before adding this one, and
            # passes the place where it does that only where a validation is due.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    @staticmethod
    def _callbacks(trainer: L.Trainer) -> list[Callback]:
        return trainer.callbacks  # type: ignore[attr-defined]

    def _end(self, trainer: L.Trainer) -> None:
        """Let the run end behind this step; Lightning then validates once more, wherever the interval stands."""
        self._ends = trainer.should_stop = True

    def _owes_whole_validation(self, trainer: L.Trainer) -> bool:
        """Whether the run ends here, and the whole split was not measured at this step."""
        return trainer.should_stop and not (self._validated_all and self.validated_step == trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The end of the run: a callback may have asked for it in a validation that took a part of the split."""
        if self._owes_whole_validation(trainer):
            loop = trainer.fit_loop.epoch_loop
            loop._batches_that_stepped -= 1  # which loggers take for the step, and has been counted by now
            self._validate(trainer)
            loop._batches_that_stepped += 1

    def _validate(self, trainer: L.Trainer) -> None:
        """Run a validation that is owed, between two batches."""
        loop, done = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.batch_progress
        # Saved behind a batch, before Lightning counted it as completed; it does so when it goes on with the next one.
        is_uncounted = done.current.completed < done.current.processed  # type: ignore[attr-defined]
        if is_uncounted:
            done.increment_completed()
        trainer.validating = True
        loop.val_loop.restarting = False
        loop.val_loop.run()
        trainer.training = True
        if is_uncounted and not trainer.should_stop:
            done.current.completed -= 1
            done.total.completed -= 1

    def _validates(self, trainer: L.Trainer) -> bool:
        """Whether a validation is due behind the batch that was last."""
        batches, interval = trainer.fit_loop.epoch_loop.total_batch_idx + 1, trainer.val_check_batch
        return interval is not None and batches > 0 and batches % interval == 0

    def _restore_best(self, step: int) -> None:
        """Make best.ckpt what the restored state says that it is; where it is lost, begin the search anew."""
        found, why = None, "it is another step's"
        try:
            found = int(read_checkpoint(self.folder / BEST)["global_step"])
        except UserError as error:
            why = str(error)
        if found == self.best_step or (step != self.best_step == trained_step(self.folder.parent / MODEL)):
            return
        if self.best_step != step:  # neither the checkpoint nor the model that was made of it is left
            print(f"note: the best model, of step {self.best_step}, is lost ({why}): this one is taken instead")
            self.best_loss, self.best_step = math.inf, None
            if self.validated_step == step:
                self.best_loss, self.best_step = self.figures["val/loss"], step
        if self.best_step == step:
            link_checkpoint(self.folder / LAST, self.folder / BEST)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            if trainer.should_stop:  # a callback asks for the end in the middle of a step: it is finished first
                self._stops_behind_step, trainer.should_stop = True, False
            return
        if self._stops_behind_step:
            trainer.should_stop = True
        step, reason = trainer.global_step, self._reason_to_stop(trainer)
        if reason > _TIME_IS_UP:
            self._save(trainer)
            number = reason - 1
            raise TrainingStopped(
                f"{signal.Signals(number).name} at step {step} of {self.steps}: saved; go on with "
                f"python -m bitnet_lit.train resume={self.folder.parent}",
                status=128 + number,
            )
        if step >= self.steps or reason == _TIME_IS_UP:
            self._end(trainer)
        elif self.every_n_steps and step % self.every_n_steps == 0 and not self._validates(trainer):
            self._save(trainer)

    def _reason_to_stop(self, trainer: L.Trainer) -> int:
        """The same number on every rank: a signal may reach them at different steps."""
        reason = _TIME_IS_UP if time.monotonic() >= self._deadline else 0
        if self.signals.number is not None:
            reason = self.signals.number + 1
        if trainer.world_size > 1:
            mine = torch.tensor(reason, device=trainer.strategy.root_device)
            reason = int(trainer.strategy.reduce(mine, reduce_op="max"))
        return reason

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated_all = trainer.should_stop or not self.validates_part  # as `ValidationOrder` sees it

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val/loss"])
        if not math.isfinite(loss):
            raise Diverged(f"step {trainer.global_step}: the validation loss is {loss}: lower optim.learning_rate")
        self.improved = loss < self.best_loss
        if self.improved:
            self.best_loss, self.best_step = loss, trainer.global_step
        self.validated_step = trainer.global_step
        self._stopped_by = self.others if trainer.should_stop and not self._ends else self._stopped_by
        self._save(trainer)
        if self.improved and trainer.is_global_zero:
            link_checkpoint(self.folder / LAST, self.folder / BEST)

    def _note_figures(self, trainer: L.Trainer) -> None:
        metrics = trainer.callback_metrics
        self.figures |= {name: float(metrics[name]) for name in metrics if name.startswith(FIGURES)}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save what was reached when the data can no longer be read; the weights are those of the last step."""
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        between_steps = progress.ready == progress.completed and not progress.ready % trainer.accumulate_grad_batches
        if (
            isinstance(exception, DataError)
            and between_steps
            and trainer.world_size == 1  # one rank alone cannot save
            and trainer.training
            and trainer.global_step > (self.saved_step or 0)
        ):
            with contextlib.suppress(OSError):  # what ended the run is what is told
                self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        """Write last.ckpt; every rank calls it."""
        self._note_figures(trainer)  # of the last step: a resumed run whose steps are done has no others
        is_logged = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if trainer.training and (is_logged or trainer.global_step >= self.steps):
            # The row of this step comes now: Lightning writes it (again, to no effect) after the callbacks.
            names = ("train/", "perf/") if is_logged else ("train/",)  # speeds are measured at logged steps only
            metrics = trainer.logged_metrics
            row = {name: float(metrics[name]) for name in metrics if name.startswith(names)}
            self.csv.log_metrics(row, trainer.global_step - 1)
        self.csv.sync()
        trainer.save_checkpoint(self.folder / LAST)
        self.saved_step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "validated_step": self.validated_step,
            "validated_all": self._validated_all,
            "stopped_by": self._stopped_by,
            "figures": self.figures,
            "csv_rows": self.csv.num_rows,
            "identity": self.identity,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state, step = checkpoint["callbacks"].get("Checkpoints", {}), checkpoint["global_step"]
        self.best_loss = state.get("best_loss", math.inf)
        self.best_step = state.get("best_step")
        self.figures = state.get("figures", {})
        self.validated_step = state.get("validated_step")
        self._validated_all = state.get("validated_all", True)  # earlier versions could only end by themselves
        self._stopped_by = state.get("stopped_by")
        self._was_restored = True
        if "validated_step" not in state:
            self._restore_earlier_version(checkpoint, step)

    def _restore_earlier_version(self, checkpoint: dict[str, Any], step: int) -> None:
        """Earlier versions noted the best loss alone: the rest follows from the two files."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        if progress["completed"] == progress["processed"] and step < self.steps:
            self.validated_step = step  # else it is validated (again), for the figures
        if math.isfinite(self.best_loss):
            try:
                best = read_checkpoint(self.folder / BEST)
                same = best["callbacks"]["Checkpoints"]["best_loss"] == self.best_loss
                self.best_step = best["global_step"] if same else step
            except UserError:
                self.best_step = step
