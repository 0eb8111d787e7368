"""Loggers: metrics.csv always; TensorBoard and Weights & Biases on request.

The CSV is our own because Lightning's deletes the file when a run is resumed. Here a resumed run keeps the rows up to
the step it resumes from and goes on behind them: metrics.csv of a run that was killed five times reads like that of
one that was not (but for a row whose step was saved and killed before the row was written).
"""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from bitnet_lit.atomic import atomic_file
from bitnet_lit.config import TrainConfig
from bitnet_lit.errors import UserError

CSV_NAME = "metrics.csv"


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; empty cells are left out."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


class CsvLogger(Logger):
    """One row per logged step; a new column rewrites the file (it happens a few times, at the start)."""

    def __init__(self, run_dir: Path, resume_step: int = 0) -> None:
        super().__init__()
        self.path = run_dir / CSV_NAME
        self._columns: list[str] = ["step"]
        self._rows: list[dict[str, Any]] = []
        if resume_step and self.path.exists():
            for row in read_metrics(self.path):
                if int(row["step"]) <= resume_step:
                    self._add(row)
        self._rewrite_needed = True

    name = "csv"
    version = 0

    def _add(self, row: dict[str, Any]) -> None:
        for column in row:
            if column not in self._columns:
                self._columns.append(column)
                self._rewrite_needed = True
        self._rows.append(row)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row; `step` is Lightning's, which counts from 0: the file says how many steps are done."""
        row = {"step": (step or 0) + 1, **{name: f"{value:.9g}" for name, value in metrics.items() if name != "epoch"}}
        if len(row) == 1:
            return
        self._add(row)
        self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write what is new."""
        if self._rewrite_needed:
            with (
                atomic_file(self.path) as temporary,
                temporary.open("w", newline="", encoding="utf-8") as file,
            ):
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(self._rows)
            self._rewrite_needed, self._written = False, len(self._rows)
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerows(self._rows[self._written :])
        self._written = len(self._rows)


def _wandb_logged_in() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


def build_loggers(config: TrainConfig, run_dir: Path, resume_step: int) -> list[Logger]:
    """The loggers of `config`; files go below `run_dir`.

    Raises:
        UserError: a logger's package is missing.
    """
    loggers: list[Logger] = [CsvLogger(run_dir, resume_step)]
    if config.logger.tensorboard:
        try:
            loggers.append(TensorBoardLogger(run_dir, name="tensorboard", version=""))
        except ModuleNotFoundError:
            raise UserError("logger=tensorboard: not installed: pip install 'bitnet-lit[tensorboard]'") from None
    if config.logger.wandb:
        offline = os.environ.get("WANDB_MODE") == "offline" or not _wandb_logged_in()
        loggers.append(
            WandbLogger(
                project=config.logger.wandb_project,
                group=config.logger.wandb_group,
                name=run_dir.name,
                save_dir=run_dir,
                offline=offline,
                # One run per folder: a resumed run goes on in the same one.
                id=f"{run_dir.parent.name}-{run_dir.name}".replace("/", "-"),
                resume="allow",
            )
        )
    return loggers
