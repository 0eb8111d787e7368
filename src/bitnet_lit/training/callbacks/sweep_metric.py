"""A search whose metric is logged by a callback of the user's own is checked at the first validation of each job.

Until then nobody knows what such a callback logs. A typing error in `sweep.metric` would otherwise be found only after
the whole job. Figures that every run writes are checked before the first job (`runs/metric_names.py`).
"""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback

from bitnet_lit.config import TrainConfig
from bitnet_lit.errors import UserError
from bitnet_lit.runs.metric_names import KEPT, metric_names


class SweepMetric(Callback):
    """Ends a run whose first validation has not logged `sweep.metric`."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self._is_checked = False

    @classmethod
    def needed(cls, config: TrainConfig) -> list[Callback]:
        """Return this callback where only callbacks of the user's own can log the metric, and nothing elsewhere."""
        is_known = config.sweep.metric in metric_names(getattr(config.data, "mix", None) or ())
        return [] if is_known or not config.callbacks.extra else [cls(config.sweep.metric)]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_checked or trainer.sanity_checking:
            return
        self._is_checked = True
        logged = sorted(str(name) for name in trainer.callback_metrics if str(name).startswith(KEPT))
        logged = trainer.strategy.broadcast(logged)  # a callback may log on rank 0 alone, and all ranks end together
        if self.metric not in logged:
            raise UserError(
                f"sweep.metric={self.metric}: not logged at the first validation: give one of {', '.join(logged)}"
            )
