"""One table for a whole sweep: what each job was, and what came out of it.

A Hydra callback. It reads what the jobs left in their folders, so it does not matter which process ran them, and a
sweep whose table got lost can be read again.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from bitnet_lit.atomic import atomic_file
from bitnet_lit.overrides import readable
from bitnet_lit.terminal import wide_console

TABLE_NAME = "sweep.csv"
FIGURES = {
    "val/loss": "val loss",
    "val/bits_per_byte": "bits/byte",
    "val/accuracy": "accuracy",
    "perf/tokens_per_s": "tokens/s",
}


def read_jobs(sweep_dir: Path) -> list[dict[str, Any]]:
    """One row per job folder: its number, its overrides, its figures or its error."""
    rows = []
    jobs = [folder for folder in sweep_dir.iterdir() if (folder / ".hydra" / "overrides.yaml").is_file()]
    for folder in sorted(jobs, key=lambda folder: (len(folder.name), folder.name)):
        overrides: Any = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "overrides.yaml"))
        row: dict[str, Any] = {"job": folder.name}
        row |= dict(map(readable, overrides))
        if (folder / "metrics.json").is_file():
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            row |= {label: metrics[name] for name, label in FIGURES.items() if name in metrics}
        elif (folder / "error.txt").is_file():
            row["error"] = (folder / "error.txt").read_text(encoding="utf-8").strip()
        else:
            row["error"] = "did not finish"
        rows.append(row)
    return rows


class SweepTable(Callback):
    """Prints the table and writes it to sweep.csv; the sweep's exit status is 1 when a job failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        sweep_dir = Path(config.hydra.sweep.dir)
        rows = read_jobs(sweep_dir)
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with (
            atomic_file(sweep_dir / TABLE_NAME) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        table = Table(title=str(sweep_dir))
        # What is the same for all jobs is in sweep.csv; here it would only take room.
        columns = [c for c in columns if c == "job" or len({str(row.get(c, "")) for row in rows}) > 1 or len(rows) == 1]
        for column in columns:
            table.add_column(column)
        for row in rows:
            cells = [row.get(column, "") for column in columns]
            table.add_row(*[f"{cell:,.4f}" if isinstance(cell, float) else str(cell) for cell in cells])
        wide_console(30 * len(columns)).print(table)
        if any("error" in row for row in rows):
            sys.exit(1)
