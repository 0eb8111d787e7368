"""At the end of a sweep one table shows the overrides and the results of every job.

`SweepTable` is a Hydra callback. It reads the files in the job folders, so it does not matter which process ran a job,
and the table of an old sweep can be made again.
"""

from __future__ import annotations

import contextlib
import csv
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from bitnet_lit.errors import UserError, one_line, without_class_name
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.files.foreign_json import read_json
from bitnet_lit.files.json_shapes import Number, Record
from bitnet_lit.files.regular_file import check_replaceable
from bitnet_lit.overrides import readable
from bitnet_lit.runs.config_keys import natural
from bitnet_lit.runs.devices import SLOTS_NAME
from bitnet_lit.runs.folder import METRICS_NAME, RECORD, is_run, is_running, locked
from bitnet_lit.runs.go_on import commands_to_go_on
from bitnet_lit.runs.job_folder import OVERRIDES_NAME, told
from bitnet_lit.runs.ranks import rank
from bitnet_lit.runs.sweep import REFUSED_NAME, RUNS_ELSEWHERE, STOP_NAME, StopHandlers, stop_number
from bitnet_lit.terminal import wide_console

TABLE_NAME = "sweep.csv"
_TABLE_START = re.compile(rb"job\s*(,|\n|\Z)")
FIGURES = {
    "val/loss": "val loss",
    "val/bits_per_byte": "bits/byte",
    "val/accuracy": "accuracy",
    "perf/tokens_per_s": "tokens/s",
}
_UNFINISHED = {"error": "did not finish"}
_METRICS = Record({}, optional=dict.fromkeys(FIGURES, Number()))


def _result(folder: Path) -> dict[str, Any]:
    """Return the figures of a job, or its error."""
    if (folder / METRICS_NAME).exists():
        metrics = read_json(folder / METRICS_NAME, _METRICS, "run the job again in another folder")
        return {label: metrics[name] for name, label in FIGURES.items() if name in metrics}
    if is_running(folder):
        return {"error": RUNS_ELSEWHERE}
    if (line := told(folder)) is not None:
        return {"error": line}
    return _UNFINISHED if is_run(folder) else {"error": "not started"}


def _row(sweep_dir: Path, folder: Path) -> dict[str, Any]:
    """Return the row of a job: its name, its overrides, and its figures or its error.

    A file that cannot be read is an error of the job.
    """
    row: dict[str, Any] = {"job": folder.relative_to(sweep_dir).as_posix()}
    try:
        overrides: Any = OmegaConf.to_container(OmegaConf.load(folder / RECORD / OVERRIDES_NAME))
        row |= dict(map(readable, overrides))
        row |= _result(folder)
    except Exception as error:  # a process that was killed may leave damaged files
        row["error"] = f"cannot be read: {one_line(error)}"
    return row


def read_jobs(sweep_dir: Path) -> list[dict[str, Any]]:
    """Return one row per job of a sweep, sorted by name: its name, its overrides, and its figures or its error."""
    rows = {}
    for record in sweep_dir.rglob(f"{RECORD}/{OVERRIDES_NAME}"):
        row = _row(sweep_dir, record.parents[1])
        rows[row["job"]] = row
    if (sweep_dir / REFUSED_NAME).is_file():
        for line in (sweep_dir / REFUSED_NAME).read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, error = line.partition("\t")
            rows[name] = {"job": name, "error": error}
    return [rows[name] for name in sorted(rows, key=natural)]


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _write_table(sweep_dir: Path, rows: list[dict[str, Any]]) -> None:
    with (
        atomic_file(sweep_dir / TABLE_NAME) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def _shown(cell: Any) -> str:
    if not isinstance(cell, float):
        return without_class_name(str(cell))
    return f"{cell:,.4f}" if abs(cell) < 100 else f"{cell:,.0f}"  # a loss, or tokens/s


def _print_table(sweep_dir: Path, rows: list[dict[str, Any]]) -> None:
    columns = _columns(rows)
    table = Table(title=str(sweep_dir))
    # Columns with the same value in all jobs are only in sweep.csv, because the terminal is narrow.
    columns = [c for c in columns if c == "job" or len({str(row.get(c, "")) for row in rows}) > 1 or len(rows) == 1]
    if any("error" in row for row in rows) and "error" not in columns:
        columns.append("error")  # all jobs failed with the same error
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*[_shown(row.get(column, "")) for column in columns])
    wide_console(30 * len(columns)).print(table)


class SweepTable(Callback):
    """Holds the sweep's lock and handles signals while it runs. At the end it prints the table and writes sweep.csv.

    The exit status of the sweep is 128 + n if signal n ended it. Otherwise it is 2 if every job failed by the user's
    mistake, 1 if a job failed, and 0 if none did.

    Attributes:
        jobs: the jobs of this start, by their folders' names; None: every job in the sweep's folder. The table shows
            jobs of earlier starts too.
        flags: the flags of Hydra with which a job alone is started, such as --config-dir.
    """

    # On the class, so that joblib does not pickle them.
    handlers: StopHandlers | None = None
    jobs: Sequence[str] | None = None
    flags: Sequence[str] = ()
    _lock = contextlib.ExitStack()
    _refused: UserError | None = None
    _is_new = False  # whether this start made the sweep's folder

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if rank() or OmegaConf.select(config, "sweep.dry_run"):  # only rank 0 writes the table and handles signals
            return
        sweep_dir = Path(config.hydra.sweep.dir)
        SweepTable.jobs = SweepTable._refused = None
        try:
            SweepTable._is_new = not sweep_dir.exists()
            sweep_dir.mkdir(parents=True, exist_ok=True)
            SweepTable._lock.enter_context(locked(sweep_dir, "another process runs a sweep"))
            remedy = "give another folder (hydra.sweep.dir=...), or move it away"
            check_replaceable(sweep_dir / TABLE_NAME, _TABLE_START, "no sweep wrote it", remedy)
        except UserError as error:  # Hydra would turn it into a warning: the sweeper raises it
            SweepTable._refused = error
            return
        except OSError:  # a file is in the way: Hydra reports it when it makes the folder
            pass
        else:
            for name in (STOP_NAME, REFUSED_NAME):  # left by an earlier start that was killed
                (sweep_dir / name).unlink(missing_ok=True)
        SweepTable.handlers = StopHandlers(sweep_dir.absolute())
        SweepTable.handlers.install()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if status := SweepTable.end():
            sys.exit(status)

    @classmethod
    def check_folder(cls) -> None:
        """Refuse to run a sweep whose folder it cannot have.

        Raises:
            UserError: another process holds the lock on the folder, or a file that no sweep wrote has the table's name.
        """
        if cls._refused is not None:
            raise cls._refused

    @classmethod
    def abandon(cls) -> None:
        """Release the lock and the signals of a sweep that an error ended before its table was written."""
        if cls.handlers is not None:
            cls.handlers.remove()
            if cls._is_new:
                with contextlib.suppress(OSError):  # a job wrote into it
                    cls.handlers.sweep_dir.rmdir()
        cls.handlers = cls._refused = None
        cls._lock.close()

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
            if rows:
                _print_table(sweep_dir, rows)
            found = {row["job"]: row for row in rows}  # a job without a record, as on a full disk, has no row
            own = rows if cls.jobs is None else [found.get(job, {"job": job, **_UNFINISHED}) for job in cls.jobs]
            status = 1 if not rows else 0 if number is not None else _report_failures(own, sweep_dir)
            if number is not None and (commands := commands_to_go_on(sweep_dir, cls.flags)):
                print("The sweep was stopped. The same command goes on with it, or each of its jobs alone with:")
                print(*(f"  {command}" for command in commands), sep="\n")
            if rows:
                _write_table(sweep_dir, rows)  # last: where the disk is full, the rest has been said
        except Exception as error:  # Hydra would turn it into a warning, and the status into 0
            print(f"error: the table of {sweep_dir}: {one_line(error)}", file=sys.stderr)
            status = 1
        for name in (STOP_NAME, REFUSED_NAME):
            (sweep_dir / name).unlink(missing_ok=True)
        shutil.rmtree(sweep_dir / SLOTS_NAME, ignore_errors=True)
        cls._lock.close()
        return status if number is None else 128 + number


def _report_failures(rows: list[dict[str, Any]], sweep_dir: Path) -> int:
    """Name the jobs that failed and those that run in other processes, and return the exit status."""
    elsewhere = [row for row in rows if row.get("error") == RUNS_ELSEWHERE]
    failed = [row for row in rows if "error" in row and row not in elsewhere]
    if elsewhere:
        names = ", ".join(row["job"] for row in elsewhere)
        print(
            f"error: {len(elsewhere)} of {len(rows)} jobs of {sweep_dir} run in other processes ({names}): give the "
            "same line again when they have ended",
            file=sys.stderr,
        )
    if failed:
        print(f"error: {len(failed)} of {len(rows)} jobs of {sweep_dir} failed:", file=sys.stderr)
        for row in failed:
            print(f"  {row['job']}: {one_line(without_class_name(row['error']))}", file=sys.stderr)
    if failed and len(failed) == len(rows) and all(str(row["error"]).startswith("UserError: ") for row in failed):
        return UserError.status
    return 1 if failed or elsewhere else 0
