"""The progress bar shows the step, the loss, the learning rate, tokens/s and the time left, validations included.

Where stderr is not a terminal, such as in a log file, or where jobs of a sweep share it, plain lines are printed
instead.
"""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from bitnet_lit.terminal import console, is_shared, time_span
from bitnet_lit.training.callbacks.step_log import StepLog
from bitnet_lit.training.plan import Plan

LINE_SECONDS = 10.0  # least time between two lines in a log file
BAR_WIDTH = 10  # columns that the bar itself has at least; a narrow terminal lacks figures before


class RichBar(ProgressBar):
    """Shows one bar for the whole run, counted in optimizer steps."""

    def __init__(self, plan: Plan, step_log: StepLog) -> None:
        super().__init__()
        self.plan, self.step_log = plan, step_log
        self._console = console(stderr=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._enabled = True
        self._last_line = 0.0
        self._clock = (0, 0.0)  # step and time of the last speed reading
        self._text = ""  # the figures beside the bar while it trains
        self._tokens_per_s = 0.0
        self._validation_loss: float | None = None
        self._validation_began = 0.0
        self._validation_seconds = 0.0  # of the newest validation, its sample texts included
        self._batches_seconds = 0.0  # of the batches of the newest validation
        part, whole = plan.validation_sequences or (1, 1)
        self._last_validation = whole / part

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock = (trainer.global_step, time.perf_counter())
        if not self._enabled or not trainer.is_global_zero or not self._console.is_terminal or is_shared():
            return
        self._progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=self.plan.steps, figures="")
        self._progress.update(self._task, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not self._enabled or not trainer.is_global_zero or step == self._clock[0]:
            return
        self._show(completed=step)
        if step % trainer.log_every_n_steps and step != self.plan.steps:  # type: ignore[attr-defined]
            return
        now = time.perf_counter()
        self._tokens_per_s = (step - self._clock[0]) * self.plan.tokens_per_step / (now - self._clock[1])
        self._clock = (step, now)
        figures = self._figures(trainer)
        if self._progress is not None:
            self._text = fitting(
                figures, self._console.width - BAR_WIDTH - len(f" {self.plan.steps}/{self.plan.steps} ")
            )
            self._show(figures=self._text)
        elif now - self._last_line > LINE_SECONDS or step == self.plan.steps:
            self._last_line = now
            self._console.print(f"step {step}/{self.plan.steps} {fitting(figures)}")

    def _show(self, **fields: Any) -> None:
        """Change what the bar shows; where there is none, do nothing."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, **fields)

    def _seconds_left(self, step: int) -> float:
        """Estimate the time of the steps and validations after `step`."""
        plan = self.plan
        steps_seconds = (plan.steps - step) * plan.tokens_per_step / self._tokens_per_s
        further_batches = (self._last_validation - 1) * self._batches_seconds
        validations = plan.validations_before_last(step) + 1
        return steps_seconds + validations * self._validation_seconds + further_batches

    def _figures(self, trainer: L.Trainer) -> dict[str, str]:
        # The loss is that of the last logged step, because reading the newest would wait for the device.
        figures = {}
        if "train/loss" in self.step_log.last:
            figures["loss"] = f"loss {self.step_log.last['train/loss']:.3f}"
        if self._validation_loss is not None:
            figures["val"] = f"val {self._validation_loss:.3f}"
        figures["rate"] = f"lr {trainer.optimizers[0].param_groups[0]['lr']:.2e}"
        figures["speed"] = f"{self._tokens_per_s:,.0f} tokens/s"
        figures["left"] = f"{time_span(self._seconds_left(trainer.global_step))} left"
        return figures

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_began = time.perf_counter()
        self._show(figures="validating")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batches_seconds = time.perf_counter() - self._validation_began

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_loss = float(trainer.callback_metrics["val/loss"])
        self._clock = (trainer.global_step, time.perf_counter())
        self._validation_seconds = self._clock[1] - self._validation_began
        self._show(figures=self._text)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()


def fitting(figures: dict[str, str], width: int | None = None) -> str:
    """Return figures in one line of at most `width` columns. The learning rate is left out first, then the speed."""
    figures = dict(figures)
    for name in ("rate", "speed"):
        if width is not None and len("  ".join(figures.values())) > width:
            figures.pop(name, None)
    return "  ".join(figures.values())
