"""At the end of a sweep one table shows the overrides and the results of every job.

`SweepTable` is a Hydra callback. It reads the files in the job folders, so it does not matter which process ran a job,
and the table of an old sweep can be made again.
"""

from __future__ import annotations

import contextlib
import csv
import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from bitnet_lit.atomic import atomic_file
from bitnet_lit.errors import one_line
from bitnet_lit.foreign_json import read_json
from bitnet_lit.json_shapes import Number, Record
from bitnet_lit.overrides import readable
from bitnet_lit.runs.config_keys import natural
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


def _result(folder: Path) -> dict[str, Any]:
    """Return the figures of a job, or its error."""
    if (folder / METRICS_NAME).exists():
        metrics = read_json(folder / METRICS_NAME, _METRICS, "run the job again in another folder")
        return {label: metrics[name] for name, label in FIGURES.items() if name in metrics}
    if (folder / ERROR_NAME).exists():
        return {"error": one_line((folder / ERROR_NAME).read_text(encoding="utf-8", errors="replace"))}
    return {"error": "did not finish"}


def _row(sweep_dir: Path, folder: Path) -> dict[str, Any]:
    """Return the row of a job: its name, its overrides, and its figures or its error.

    A file that cannot be read is an error of the job.
    """
    row: dict[str, Any] = {"job": folder.relative_to(sweep_dir).as_posix()}
    try:
        overrides: Any = OmegaConf.to_container(OmegaConf.load(folder / RECORD / _OVERRIDES_NAME))
        row |= dict(map(readable, overrides))
        row |= _result(folder)
    except Exception as error:  # a process that was killed may leave damaged files
        row["error"] = f"cannot be read: {one_line(error)}"
    return row


def read_jobs(sweep_dir: Path) -> list[dict[str, Any]]:
    """Return one row per job of a sweep, sorted by name: its name, its overrides, and its figures or its error."""
    rows = {}
    for record in sweep_dir.rglob(f"{RECORD}/{_OVERRIDES_NAME}"):
        row = _row(sweep_dir, record.parents[1])
        rows[row["job"]] = row
    if (sweep_dir / REFUSED_NAME).is_file():
        for line in (sweep_dir / REFUSED_NAME).read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, error = line.partition("\t")
            rows[name] = {"job": name, "error": error}
    return [rows[name] for name in sorted(rows, key=natural)]


def commands_to_go_on(sweep_dir: Path) -> list[str]:
    """Return a shell command for each job that is not complete. It resumes the job, or starts it in its own folder."""
    commands = []
    folders = [record.parents[1] for record in sweep_dir.rglob(f"{RECORD}/{_OVERRIDES_NAME}")]
    for folder in sorted(folders, key=lambda folder: natural(folder.as_posix())):
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
    # Columns with the same value in all jobs are only in sweep.csv, because the terminal is narrow.
    columns = [c for c in columns if c == "job" or len({str(row.get(c, "")) for row in rows}) > 1 or len(rows) == 1]
    if any("error" in row for row in rows) and "error" not in columns:
        columns.append("error")  # all jobs failed with the same error
    for column in columns:
        table.add_column(column)
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        table.add_row(*[f"{cell:,.4f}" if isinstance(cell, float) else str(cell) for cell in cells])
    wide_console(30 * len(columns)).print(table)


class SweepTable(Callback):
    """Handles signals while a sweep runs. At the end it prints the table and writes it to sweep.csv.

    The exit status of the sweep is 128 + n if signal n ended it, and 1 if a job failed.
    """

    handlers: StopHandlers | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if rank():  # only rank 0 writes the table and handles signals
            return
        sweep_dir = Path(config.hydra.sweep.dir)
        with contextlib.suppress(NotADirectoryError):  # a file is in the way: Hydra reports it when it makes the folder
            for name in (STOP_NAME, REFUSED_NAME):  # left by an earlier sweep that was killed
                (sweep_dir / name).unlink(missing_ok=True)
        SweepTable.handlers = StopHandlers(sweep_dir.absolute())  # on the class, so joblib does not pickle it
        SweepTable.handlers.install()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if status := SweepTable.end():
            sys.exit(status)

    @classmethod
    def end(cls) -> int:
        """Write the table of the running sweep, and return the exit status."""
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
