"""One table for a whole sweep: what each job was, and what came out of it.

A Hydra callback. It reads what the jobs left in their folders, so it does not matter which process ran them, and a
sweep whose table got lost can be read again.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from bitnet_lit.atomic import atomic_file
from bitnet_lit.errors import one_line
from bitnet_lit.overrides import readable
from bitnet_lit.runs.sweep import ERROR_NAME, REFUSED_NAME, STOP_NAME, StopHandlers, stop_number
from bitnet_lit.terminal import wide_console

TABLE_NAME = "sweep.csv"
FIGURES = {
    "val/loss": "val loss",
    "val/bits_per_byte": "bits/byte",
    "val/accuracy": "accuracy",
    "perf/tokens_per_s": "tokens/s",
}


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _result(folder: Path) -> dict[str, Any]:
    """The figures of a job, or its error."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return {label: metrics[name] for name, label in FIGURES.items() if name in metrics}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as error:
        return {"error": f"metrics.json cannot be read: {one_line(error)}"}
    try:
        return {"error": (folder / ERROR_NAME).read_text(encoding="utf-8").strip()}
    except FileNotFoundError:
        return {"error": "did not finish"}


def read_jobs(sweep_dir: Path) -> list[dict[str, Any]]:
    """One row per job folder below a sweep's: its name, its overrides, its figures or its error."""
    rows = {}
    for record in sweep_dir.rglob(".hydra/overrides.yaml"):
        folder = record.parents[1]
        overrides: Any = OmegaConf.to_container(OmegaConf.load(record))
        name = folder.relative_to(sweep_dir).as_posix()
        rows[name] = {"job": name, **dict(map(readable, overrides)), **_result(folder)}
    if (sweep_dir / REFUSED_NAME).is_file():
        for line in (sweep_dir / REFUSED_NAME).read_text(encoding="utf-8").splitlines():
            name, _, error = line.partition("\t")
            rows[name] = {"job": name, "error": error}
    return [rows[name] for name in sorted(rows, key=_natural)]


def write_table(sweep_dir: Path, rows: list[dict[str, Any]]) -> None:
    """Write sweep.csv and print the table."""
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
    if any("error" in row for row in rows) and "error" not in columns:
        columns.append("error")  # all failed for one reason
    for column in columns:
        table.add_column(column)
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        table.add_row(*[f"{cell:,.4f}" if isinstance(cell, float) else str(cell) for cell in cells])
    wide_console(30 * len(columns)).print(table)


class SweepTable(Callback):
    """Hears signals while a sweep runs; at its end prints the table and writes it to sweep.csv.

    The sweep's exit status is 128 + n when signal n ended it, and 1 when a job failed.
    """

    handlers: StopHandlers | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        sweep_dir = Path(config.hydra.sweep.dir)
        for name in (STOP_NAME, REFUSED_NAME):  # of an earlier sweep that was killed
            (sweep_dir / name).unlink(missing_ok=True)
        SweepTable.handlers = StopHandlers(sweep_dir.absolute())  # of the class: it is not sent to other processes
        SweepTable.handlers.install()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if status := SweepTable.end():
            sys.exit(status)

    @classmethod
    def end(cls) -> int:
        """Write the table of the sweep that runs; returns the exit status."""
        if cls.handlers is None:
            return 0
        sweep_dir, number = cls.handlers.sweep_dir, stop_number(cls.handlers.sweep_dir)
        cls.handlers.remove()
        cls.handlers = None
        rows = read_jobs(sweep_dir)
        status = 1 if any("error" in row for row in rows) or not rows else 0
        try:
            if rows:
                write_table(sweep_dir, rows)
        except Exception as error:  # Hydra would turn it into a warning, and the status into 0
            print(f"error: the table of {sweep_dir}: {one_line(error)}", file=sys.stderr)
            status = 1
        for name in (STOP_NAME, REFUSED_NAME):
            (sweep_dir / name).unlink(missing_ok=True)
        return status if number is None else 128 + number
