"""`StepLog` logs what optimizer steps measured: loss, norm of the gradient, learning rate, and the speed.

At every logging step it takes `step_figures` of the module. On a GPU they are written when they have arrived on the
host, some steps later, under the step that they belong to (figures.py). Before a validation, before a checkpoint and at
the end of the run everything is written.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from bitnet_lit.training.distillation import PARTS
from bitnet_lit.training.figures import Figure, StepFigures
from bitnet_lit.training.module import BitNetModule
from bitnet_lit.training.sharing import mean_over_ranks

CHECK_STEPS = 50
"""Steps between two looks at whether the run has diverged, where it logs less often."""
_FOUND_INF = "found_inf"


class StepLog(Callback):
    """Logs the figures of every `log_every_n_steps`-th optimizer step, and stops a run that has diverged.

    Attributes:
        last: the figures that were logged last.
    """

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self._waiting: deque[StepFigures] = deque()
        self._taken_step = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, BitNetModule)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                self._take(trainer, pl_module)
            elif trainer.global_step % CHECK_STEPS == 0:
                self._waiting.append(StepFigures(trainer.global_step, self._found_inf(pl_module), pl_module.device))
        while self._waiting and self._may_be_read(trainer, self._waiting[0]):
            self._write(trainer, pl_module)

    @staticmethod
    def _may_be_read(trainer: L.Trainer, waiting: StepFigures) -> bool:
        """Return whether to read figures. Several ranks read them one step later, so that all stop at the same step."""
        return waiting.has_arrived() if trainer.world_size == 1 else waiting.step < trainer.global_step

    @staticmethod
    def _found_inf(module: BitNetModule) -> dict[str, Figure]:
        found_inf = module.divergence.found_inf
        return {} if found_inf is None else {_FOUND_INF: found_inf}

    @staticmethod
    def _share_losses(trainer: L.Trainer, module: BitNetModule) -> None:
        """Make the losses of the step the means over the ranks, which meet here. They do not at every step."""
        names = [name for name in ("train/loss", *PARTS) if name in module.step_figures]
        if trainer.world_size > 1 and names:
            losses = torch.stack([torch.as_tensor(module.step_figures[name]) for name in names])
            means = dict(zip(names, mean_over_ranks(losses).unbind(), strict=True))
            module.step_figures |= means
            trainer.callback_metrics.update(means)

    def _take(self, trainer: L.Trainer, module: BitNetModule) -> None:
        self._share_losses(trainer, module)
        figures = {**module.step_figures, **self._found_inf(module)}
        self._waiting.append(StepFigures(trainer.global_step, figures, module.device))
        self._taken_step = trainer.global_step

    def _write(self, trainer: L.Trainer, module: BitNetModule, checks: bool = True) -> None:
        """Write the first of the waiting figures.

        Args:
            checks: whether figures of a step that was not finite end the run. All ranks meet for that.
        """
        waiting = self._waiting.popleft()
        figures = waiting.read()
        if figures.pop(_FOUND_INF, 0.0):
            self._waiting.clear()  # later figures come from weights that no longer change
            if not checks:
                return
            module.check_finite()
        if not figures:
            return
        self.last = figures
        as_tensors = {name: torch.tensor(value) for name, value in figures.items()}
        trainer.callback_metrics.update(as_tensors)
        trainer.logged_metrics.update(as_tensors)
        for logger in trainer.loggers:
            # Lightning counts the steps of loggers from 0.
            logger.log_metrics({**figures, "epoch": trainer.current_epoch}, step=waiting.step - 1)
            logger.save()

    def settle(self, trainer: L.Trainer, is_end: bool = False) -> None:
        """Write what is waiting. Every rank must call this method.

        Args:
            is_end: whether the run ends here: then the figures of the last step are written too.

        Raises:
            Diverged: a step was not finite. The weights are those before it.
        """
        module = trainer.lightning_module
        assert isinstance(module, BitNetModule)
        module.check_finite()
        if self._taken_step < trainer.global_step:
            if is_end:
                self._take(trainer, module)
            else:
                self._share_losses(trainer, module)
        while self._waiting:
            self._write(trainer, module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the rows that the device has computed; the error that ended the run must be seen, and no other.

        The other ranks may not come here, so nothing waits for them.
        """
        assert isinstance(pl_module, BitNetModule)
        with contextlib.suppress(Exception):
            while self._waiting:
                self._write(trainer, pl_module, checks=False)
