"""One table for a whole sweep: what each job was, and what came out of it.

A Hydra callback. It reads what the jobs left in their folders, so it does not matter which process ran them, and a
sweep whose table got lost can be read again.
"""

from __future__ import annotations

import contextlib
import csv
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from bitnet_lit.atomic import atomic_file
from bitnet_lit.errors import one_line
from bitnet_lit.foreign_json import Number, Record, read_json
from bitnet_lit.overrides import readable
from bitnet_lit.runs.folder import ERROR_NAME, METRICS_NAME, RECORD, can_be_resumed
from bitnet_lit.runs.ranks import rank
from bitnet_lit.runs.sweep import REFUSED_NAME, STOP_NAME, StopHandlers, stop_number
from bitnet_lit.terminal import wide_console

TABLE_NAME = "sweep.csv"
FIGURES = {
    "val/loss": "val loss",
    "val/bits_per_byte": "bits/byte",
    "val/accuracy": "accuracy",
    "perf/tokens_per_s": "tokens/s",
}
_METRICS = Record({}, optional=dict.fromkeys(FIGURES, Number()))
_OVERRIDES_NAME = "overrides.yaml"  # Hydra's


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _result(folder: Path) -> dict[str, Any]:
    """The figures of a job, or its error."""
    if (folder / METRICS_NAME).exists():
        metrics = read_json(folder / METRICS_NAME, _METRICS, "run the job again in another folder")
        return {label: metrics[name] for name, label in FIGURES.items() if name in metrics}
    if (folder / ERROR_NAME).exists():
        return {"error": one_line((folder / ERROR_NAME).read_text(encoding="utf-8", errors="replace"))}
    return {"error": "did not finish"}


def _row(sweep_dir: Path, folder: Path) -> dict[str, Any]:
    """What a job was and what came out of it; what cannot be read of it is its error."""
    row: dict[str, Any] = {"job": folder.relative_to(sweep_dir).as_posix()}
    try:
        overrides: Any = OmegaConf.to_container(OmegaConf.load(folder / RECORD / _OVERRIDES_NAME))
        row |= dict(map(readable, overrides))
        row |= _result(folder)
    except Exception as error:  # a process that was killed may leave anything
        row["error"] = f"cannot be read: {one_line(error)}"
    return row


def read_jobs(sweep_dir: Path) -> list[dict[str, Any]]:
    """One row per job folder below a sweep's: its name, its overrides, its figures or its error."""
    rows = {}
    for record in sweep_dir.rglob(f"{RECORD}/{_OVERRIDES_NAME}"):
        row = _row(sweep_dir, record.parents[1])
        rows[row["job"]] = row
    if (sweep_dir / REFUSED_NAME).is_file():
        for line in (sweep_dir / REFUSED_NAME).read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, error = line.partition("\t")
            rows[name] = {"job": name, "error": error}
    return [rows[name] for name in sorted(rows, key=_natural)]


def commands_to_go_on(sweep_dir: Path) -> list[str]:
    """For each job that is not complete: the command that goes on with it, or does it, in the job's own folder."""
    commands = []
    folders = [record.parents[1] for record in sweep_dir.rglob(f"{RECORD}/{_OVERRIDES_NAME}")]
    for folder in sorted(folders, key=lambda folder: _natural(folder.as_posix())):
        if (folder / METRICS_NAME).exists():
            continue
        if can_be_resumed(folder):
            arguments = [f"resume={folder}"]
        else:
            try:
                overrides: Any = OmegaConf.to_container(OmegaConf.load(folder / RECORD / _OVERRIDES_NAME))
            except Exception:  # its row says that it cannot be read
                continue
            arguments = [*overrides, f"hydra.run.dir={folder}"]
        commands.append(shlex.join(["python", "-m", "bitnet_lit.train", *arguments]))
    return commands


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
        if rank():  # the first one writes the table, and hears signals for all
            return
        sweep_dir = Path(config.hydra.sweep.dir)
        with contextlib.suppress(NotADirectoryError):  # a file lies there: Hydra's error, when it makes the folder
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
        try:
            rows = read_jobs(sweep_dir)
            status = 1 if any("error" in row for row in rows) or not rows else 0
            if rows:
                write_table(sweep_dir, rows)
            if number is not None and (commands := commands_to_go_on(sweep_dir)):
                print(
                    "The sweep was stopped. Each of its jobs that is not complete goes on with:", *commands, sep="\n  "
                )
        except Exception as error:  # Hydra would turn it into a warning, and the status into 0
            print(f"error: the table of {sweep_dir}: {one_line(error)}", file=sys.stderr)
            status = 1
        for name in (STOP_NAME, REFUSED_NAME):
            (sweep_dir / name).unlink(missing_ok=True)
        return status if number is None else 128 + number
