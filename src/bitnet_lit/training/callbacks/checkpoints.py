"""`Checkpoints` decides when a run saves and when it ends.

Before a checkpoint is written, all rows and samples up to its step are on the disk. What depends on the checkpoint
(best.ckpt, the model folders, metrics.json) can be made from it again. So a run that was killed at any moment goes on
in three steps: it drops what was written after the checkpoint, makes the files that are still missing, and trains on.

A run ends at its last step, when its time is up, or when a callback of the user's own sets `trainer.should_stop`, as
EarlyStopping does. The last validation always covers the whole validation split. The best step is found by losses over
the part of the split that every validation takes, the last one included.

A checkpoint is written after each validation, every `every_n_steps` optimizer steps, and when the run must stop because
of a signal or because its data cannot be read any more. If a validation was due at that step and has not run yet, the
resumed run starts with it.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from bitnet_lit.checkpoints.formats.model_folder import trained_step
from bitnet_lit.errors import DataError, Diverged, TrainingStopped, UserError
from bitnet_lit.runs.folder import BEST, LAST, MODEL
from bitnet_lit.runs.go_on import command_to_resume
from bitnet_lit.runs.metric_names import KEPT
from bitnet_lit.runs.signals import StopSignals
from bitnet_lit.training.callbacks.lightning_loop import (
    count_batches,
    count_step_of_validation,
    validate_after_end,
    validate_now,
    validation_is_due,
)
from bitnet_lit.training.callbacks.step_log import StepLog
from bitnet_lit.training.callbacks.stop_reason import TIME_IS_UP, StopReason
from bitnet_lit.training.checkpoint_file import check_plain, link_checkpoint, read_checkpoint
from bitnet_lit.training.loggers import CsvLogger
from bitnet_lit.training.module import BitNetModule


class Checkpoints(Callback):
    """Writes last.ckpt and best.ckpt (the lowest validation loss), and ends the run.

    Args:
        folder: the folder of the checkpoints.
        every_n_steps: optimizer steps between checkpoints; None saves only after validations.
        steps: optimizer steps of the run.
        max_time: the time after which the run validates, saves and ends; None sets no limit.
        signals: the signals that ask the run to stop.
        csv: the logger of metrics.csv, whose rows are flushed to the disk before a checkpoint.
        step_log: writes the rows of steps. What waits in it is written before a validation and before a checkpoint.
        identity: the identity of the run, which each checkpoint holds (see `identity.py`).
        precision: the precision of the run, which each checkpoint holds, so that a resume can say that it changes.
        part: describes the part of the validation split that every validation takes; None: it is the whole split.
        others: `callbacks.extra` of the config. A run that one of these callbacks ended goes on only if they changed.

    Attributes:
        best_loss: lowest logged val/loss so far, in nats per token; inf before the first validation.
        best_step: the optimizer step of `best_loss`; None before the first validation.
        improved: whether the last validation was the best so far.
        figures: metrics of the last validation (over the whole split, if it covered it) and of the last optimizer step.
        sequences_per_step: sequences of an optimizer step, which each checkpoint holds (see `elastic.py`).
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int | None,
        steps: int,
        max_time: timedelta | None,
        signals: StopSignals,
        csv: CsvLogger,
        step_log: StepLog,
        identity: dict[str, Any],
        precision: str,
        part: str | None,
        others: dict[str, Any],
    ) -> None:
        self.folder, self.every_n_steps, self.steps = folder, every_n_steps, steps
        self._stop_reason = StopReason(signals, max_time)
        self.signals, self.csv, self.step_log, self.identity = signals, csv, step_log, identity
        self.best_loss, self.improved = math.inf, False
        self.best_step: int | None = None
        self.figures: dict[str, float] = {}
        self.validated_loss = math.inf  # the logged val/loss of `validated_step`
        self.validated_step: int | None = None
        self.saved_step: int | None = None
        self.precision = precision
        self.sequences_per_step: int | None = None
        self.part, self.others = part, others
        self._best_part = part  # in which `best_loss` was measured
        self._validated_all = False
        self._stopped_by: dict[str, Any] | None = None  # `others`, if one of them has ended the run
        self._ends, self._stops_behind_step = False, False
        self._was_restored = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, BitNetModule)
        self.sequences_per_step = pl_module.plan.samples_per_step
        self.folder = trainer.strategy.broadcast(self.folder)  # under torchrun only rank 0 knows the folder so far
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.is_running, self.signals.how_to_go_on = True, self._how_to_go_on
        self._stop_reason.start()
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
        self._forget_best_of_another_part(trainer)
        if self._owes_whole_validation(trainer) or (
            self.validated_step != trainer.global_step and validation_is_due(trainer)
        ):
            validate_now(trainer)
        elif self.validated_step == trainer.global_step and not validation_is_due(trainer):
            count_step_of_validation(trainer)

    @staticmethod
    def _callbacks(trainer: L.Trainer) -> list[Callback]:
        return trainer.callbacks  # type: ignore[attr-defined]

    def _end(self, trainer: L.Trainer) -> None:
        """End the run after this step. Lightning then validates once more, even if no validation is due."""
        self._ends = trainer.should_stop = True

    def _owes_whole_validation(self, trainer: L.Trainer) -> bool:
        """Return whether the run ends here and the whole validation split has not been measured at this step."""
        return trainer.should_stop and not (self._validated_all and self.validated_step == trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate on the whole split at the end, if a callback ended the run in a validation on a part of it."""
        if self._owes_whole_validation(trainer):
            validate_after_end(trainer)

    def _restore_best(self, step: int) -> None:
        """Make best.ckpt agree with the restored state. If the best weights are lost, count the best from here."""
        found, why = None, "it is another step's"
        try:
            found = int(read_checkpoint(self.folder / BEST)["global_step"])
        except UserError as error:
            why = str(error)
        if found == self.best_step or (step != self.best_step == trained_step(self.folder.parent / MODEL)):
            return
        if self.best_step != step:  # neither best.ckpt nor the model folder made from it is left
            line = f"note: the best model, of step {self.best_step}, is lost ({why}): this one is taken instead"
            print(line, file=sys.stderr)
            self.best_loss, self.best_step = math.inf, None
            if self.validated_step == step:
                self.best_loss, self.best_step = self.validated_loss, step
        if self.best_step == step:
            link_checkpoint(self.folder / LAST, self.folder / BEST)

    def _forget_best_of_another_part(self, trainer: L.Trainer) -> None:
        """Count the best from the next validation on, if it takes another part of the split than those before."""
        if self._best_part == self.part or (trainer.should_stop and not self._owes_whole_validation(trainer)):
            return
        if trainer.is_global_zero and self.best_step is not None:
            taken = self.part or "the whole split"
            line = f"note: validations take {taken} from here on: losses over another part cannot be compared"
            print(f"{line} with theirs, so the best model is chosen anew", file=sys.stderr)
        self.best_loss, self.best_step, self._best_part = math.inf, None, self.part

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            if trainer.should_stop:  # a callback ends the run in the middle of a step, which is finished first
                self._stops_behind_step, trainer.should_stop = True, False
            return
        if self._stops_behind_step:
            trainer.should_stop = True
        step, reason = trainer.global_step, self._stop_reason(trainer)
        if reason > TIME_IS_UP:
            self._save(trainer)
            number = reason - 1
            raise TrainingStopped(
                f"{signal.Signals(number).name} at step {step} of {self.steps}: saved; go on with "
                f"{command_to_resume(self.folder.parent)}",
                status=128 + number,
            )
        if step >= self.steps or reason == TIME_IS_UP:
            self._end(trainer)
        elif self.every_n_steps and step % self.every_n_steps == 0 and not validation_is_due(trainer):
            self._save(trainer)

    def _how_to_go_on(self) -> str:
        """Return how to go on where nothing can be saved any more."""
        if self.saved_step is None:
            return "no checkpoint was written: give the same command again"
        return f"go on from step {self.saved_step} with {command_to_resume(self.folder.parent)}"

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step_log.settle(trainer, is_end=trainer.should_stop)
        self._validated_all = trainer.should_stop or self.part is None  # the same rule as in `ValidationOrder`

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, BitNetModule)
        loss = self.validated_loss = float(trainer.callback_metrics["val/loss"])
        for each in (loss, pl_module.whole_figures.get("val/loss", loss)):
            if not math.isfinite(each):
                raise Diverged(f"step {trainer.global_step}: the validation loss is {each}: lower optim.learning_rate")
        self.improved = loss < self.best_loss
        if self.improved:
            self.best_loss, self.best_step = loss, trainer.global_step
        self.validated_step = trainer.global_step
        self._stopped_by = self.others if trainer.should_stop and not self._ends else self._stopped_by
        self._save(trainer)
        if self.improved and trainer.is_global_zero:
            link_checkpoint(self.folder / LAST, self.folder / BEST)

    def _note_figures(self, trainer: L.Trainer) -> None:
        metrics, module = trainer.callback_metrics, trainer.lightning_module
        assert isinstance(module, BitNetModule)
        self.figures |= {name: float(metrics[name]) for name in metrics if name.startswith(KEPT)} | module.whole_figures

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the state of the last optimizer step when the data cannot be read any more."""
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        between_steps = progress.ready == progress.completed and not progress.ready % trainer.accumulate_grad_batches
        if (
            isinstance(exception, DataError)
            and between_steps
            and trainer.world_size == 1  # saving needs every rank
            and trainer.training
            and trainer.global_step > (self.saved_step or 0)
        ):
            with contextlib.suppress(OSError, Diverged):  # the user must see the error that ended the run, not this one
                self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        """Write last.ckpt. Every rank must call this method."""
        # The row of this step must be on the disk before the checkpoint, and no weights that are not finite in it.
        self.step_log.settle(trainer, is_end=trainer.training and trainer.global_step >= self.steps)
        self._note_figures(trainer)  # a resumed run with no steps left takes its figures from the checkpoint
        self.csv.sync()
        trainer.save_checkpoint(self.folder / LAST)
        self.saved_step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "best_part": self._best_part,
            "validated_step": self.validated_step,
            "validated_loss": self.validated_loss,
            "validated_all": self._validated_all,
            "stopped_by": self._stopped_by,
            "figures": self.figures,
            "csv_rows": self.csv.num_rows,
            "identity": self.identity,
            "precision": self.precision,
            "sequences_per_step": self.sequences_per_step,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state, step = checkpoint["callbacks"].get("Checkpoints", {}), checkpoint["global_step"]
        self.best_loss = state.get("best_loss", math.inf)
        self.best_step = state.get("best_step")
        self.figures = state.get("figures", {})
        self._best_part = state.get("best_part")  # earlier versions compared the whole split, or its first batches
        self.validated_step = state.get("validated_step")
        self.validated_loss = state.get("validated_loss", self.figures.get("val/loss", math.inf))
        self._validated_all = state.get("validated_all", True)  # in earlier versions no callback could end a run
        self._stopped_by = state.get("stopped_by")
        self._was_restored = True
        if "validated_step" not in state:
            self._restore_earlier_version(checkpoint, step)
        count_batches(checkpoint, trainer.accumulate_grad_batches)

    def _restore_earlier_version(self, checkpoint: dict[str, Any], step: int) -> None:
        """Restore the state from a checkpoint of an earlier version, which held only the best loss."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        if progress["completed"] == progress["processed"] and step < self.steps:
            self.validated_step = step  # otherwise the resumed run validates again
        if math.isfinite(self.best_loss):
            try:
                best = read_checkpoint(self.folder / BEST)
                same = best["callbacks"]["Checkpoints"]["best_loss"] == self.best_loss
                self.best_step = best["global_step"] if same else step
            except UserError:
                self.best_step = step
