"""Every run logs to metrics.csv. TensorBoard, Weights & Biases and the loggers of `logger.extra` are added on request.

`CsvLogger` replaces Lightning's CSVLogger, which deletes the file when a run is resumed. A resumed run keeps the rows
that its checkpoint counted and appends the next ones. So metrics.csv is the same whether or not the run was killed.
"""

from __future__ import annotations

import csv
import netrc
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from bitnet_lit.config import TrainConfig
from bitnet_lit.config.slots import as_values
from bitnet_lit.errors import UserError
from bitnet_lit.extras import needs
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.instantiate import instantiate
from bitnet_lit.runs.config_keys import flat
from bitnet_lit.runs.folder import CSV_NAME
from bitnet_lit.runs.metrics_csv import read_metrics


class CsvLogger(Logger):
    """Writes one row per logged step. A new column rewrites the file, which happens a few times at the start.

    Args:
        resume_step: the optimizer step that the run goes on from; 0 for a new run.
        num_rows: number of rows that the checkpoint counted; None keeps every row up to `resume_step`.
    """

    def __init__(self, run_dir: Path, resume_step: int = 0, num_rows: int | None = None) -> None:
        super().__init__()
        self.path = run_dir / CSV_NAME
        self._columns: list[str] = ["step"]
        self._rows: list[dict[str, Any]] = []
        self._rewrite_needed, self._written = True, 0
        if resume_step and self.path.exists():
            for row in read_metrics(self.path)[:num_rows]:
                if int(row["step"]) <= resume_step:
                    self._add(row)

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
        """Do nothing: config.yaml holds the hyperparameters."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row. Lightning counts `step` from 0; the file says how many optimizer steps are done."""
        row = {
            "step": str((step or 0) + 1),
            **{name: f"{value:.9g}" for name, value in metrics.items() if name != "epoch"},
        }
        is_there = bool(self._rows) and self._rows[-1]["step"] == row["step"] and self._rows[-1].keys() == row.keys()
        if len(row) == 1 or is_there:  # a resumed run may log the step of its checkpoint again
            return
        self._add(row)
        self.save()

    @property
    def num_rows(self) -> int:
        """Number of rows so far."""
        return len(self._rows)

    @rank_zero_only
    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def finalize(self, status: str) -> None:
        """Do nothing: every row is already written. Lightning's own method would write again after a failed write."""

    @rank_zero_only
    def save(self) -> None:
        """Append the new rows, or rewrite the file if there is a new column."""
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
        if self._written == len(self._rows):
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerows(self._rows[self._written :])
        self._written = len(self._rows)


def _wandb_logged_in() -> bool:
    """Return whether wandb would find an API key. Without one, wandb itself would ask the user or fail."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_id(run_dir: Path) -> str | None:
    """Return the id that wandb gave a run, from the folder that it wrote; None where it wrote none.

    A resumed run goes on under this id. A new run gets an id of its own: under one that the service knows already,
    steps that were logged before would be dropped.
    """
    written = re.compile(r"(?:offline-)?run-\d+_\d+-(.+)")
    found = [match[1] for path in sorted(run_dir.glob("wandb/*")) if (match := written.fullmatch(path.name))]
    return found[-1] if found else None


def log_hyperparams(loggers: Sequence[Logger], config: TrainConfig) -> None:
    """Write the config for the page HPARAMS of `logger=tensorboard`, with val/loss as the metric that it compares.

    TensorBoardLogger's own method would write a first value of the metric, which no step has measured.
    """
    from torch.utils.tensorboard.summary import hparams

    values = {key: value for key, value in flat(as_values(config)).items() if value is not None}
    plain = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()}
    tensorboard = next(logger for logger in loggers if isinstance(logger, TensorBoardLogger))  # later ones are extra
    writer = tensorboard.experiment._get_file_writer()
    for summary in hparams(plain, {"val/loss": 0.0}):  # the number is not written
        writer.add_summary(summary)


def build_loggers(config: TrainConfig, run_dir: Path, csv_logger: CsvLogger, resume_step: int) -> list[Logger]:
    """Return the loggers of `config`. Their files are written below `run_dir`.

    Args:
        resume_step: the optimizer step that the run goes on from; 0 for a new run.

    Raises:
        UserError: a logger's package is not installed, or a logger of `logger.extra` cannot be made.
    """
    loggers: list[Logger] = [csv_logger]
    if config.logger.tensorboard:
        with needs("tensorboard", "logger=tensorboard"):
            loggers.append(TensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=resume_step or None))
    if config.logger.wandb:
        # If the user has set WANDB_MODE, it decides. WandbLogger's own `offline` would set a mode that newer versions
        # of wandb read as online.
        mode = None if os.environ.get("WANDB_MODE") or _wandb_logged_in() else "offline"
        with needs("wandb", "logger=wandb"):
            import wandb  # noqa: F401  Lightning imports it only when the first row is logged
        wandb_logger = WandbLogger(
            project=config.logger.wandb_project,
            group=config.logger.wandb_group,
            name=run_dir.name,
            save_dir=run_dir,
            mode=mode,
            config=as_values(config),
            id=_wandb_id(run_dir) if resume_step else None,
            resume="allow",
        )
        # Lightning gives wandb.init anonymous=None, and newer versions of wandb warn of any value.
        getattr(wandb_logger, "_wandb_init", {}).pop("anonymous", None)
        loggers.append(wandb_logger)
    for name, values in config.logger.extra.items():
        if values is None:
            continue
        logger = instantiate(values, f"logger.extra.{name}")
        if not isinstance(logger, Logger):
            raise UserError(
                f"logger.extra.{name}: {type(logger).__name__} is no logger: derive it from lightning's Logger"
            )
        logger.log_hyperparams(as_values(config))
        loggers.append(logger)
    return loggers
