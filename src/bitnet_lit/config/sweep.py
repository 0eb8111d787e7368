"""This module has the keys of a sweep (`train -m`) that say how it runs. What it varies is in the overrides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitnet_lit.config.checks import COUNT, SIZE, Checked, Range, one_of
from bitnet_lit.errors import UserError


@dataclass
class SweepConfig(Checked):
    """SweepConfig says how a sweep runs. These keys do not change what a job computes."""

    dry_run: bool = False
    """Compose every job, check all that can be checked without training, and print the jobs with their steps, memory
    and estimated time. Nothing is trained and nothing is written. It works for a single run too."""
    n_trials: int = 20
    """sweep=optuna_*: trials in all, those of earlier starts included."""
    metric: str = "val/loss"
    """sweep=optuna_*: the figure to optimize, from metrics.json: val/loss (of the last step, over the whole validation
    split), val/best_loss, val/accuracy, ..."""
    direction: str = "minimize"
    """sweep=optuna_*: minimize or maximize."""
    sampler: str = "tpe"
    """sweep=optuna_*: tpe (learns from earlier trials) or random."""
    seed: int = 0
    """sweep=optuna_*: the seed of the sampler."""

    OWNER: ClassVar[str] = "sweep."
    RANGES: ClassVar[dict[str, Range]] = {"n_trials": SIZE, "seed": COUNT}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.metric:
            raise UserError("sweep.metric= is empty: give a figure of metrics.json, such as val/loss")
        one_of("sweep.direction", self.direction, ("minimize", "maximize"))
        one_of("sweep.sampler", self.sampler, ("tpe", "random"))
