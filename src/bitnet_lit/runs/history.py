"""`read_runs` finds runs on the disk and reads what they logged, for the commands that compare runs.

A run may be complete, on its way, killed or failed. Its state is read from the files that it has (`runs/folder.py`):
metrics.json says that it is complete, error.txt that it failed. Without either it is unfinished. A run that a signal
stopped is unfinished too, and error.txt says at which step. A job that a sweep never began has Hydra's record alone.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_lit.errors import UserError, list_remedy, one_line, without_class_name
from bitnet_lit.files.foreign_json import read_json
from bitnet_lit.files.json_shapes import Record
from bitnet_lit.files.plain_yaml import read_yaml
from bitnet_lit.runs.config_keys import learned_from, of_this_version
from bitnet_lit.runs.folder import (
    CHECKPOINTS,
    CONFIG_NAME,
    CSV_NAME,
    ERROR_NAME,
    METRICS_NAME,
    MODEL,
    MODEL_LAST,
    RECORD,
    SWEEP_RECORD,
    is_run,
)
from bitnet_lit.runs.job_folder import State, is_stop, state, told
from bitnet_lit.runs.metrics_csv import read_metrics

DONE, UNFINISHED, FAILED = "done", "unfinished", "failed"
_NO_RUNS_INSIDE = {CHECKPOINTS, MODEL, MODEL_LAST, "wandb", "tensorboard", "mlruns"}
_HUGE, _SLOWEST = 1e30, 1e-6  # beyond these a metric, or a speed in tokens/s, comes from a damaged file
_MOST = 2**40  # of anything that is counted here; a larger number comes from a damaged file
_REMEDY = "put a copy of it there, or move it away"
_NAMED_BY_FOLDER = "move it away to name the run by its folder"


@dataclass(frozen=True)
class Curve:
    """A logged metric.

    Attributes:
        steps: optimizer steps, int64 (N,), rising.
        values: float64 (N,), which may hold NaN.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> Curve:
        """The points that are numbers below 1e30, one for each step; the last one where a step was logged twice."""
        is_kept = np.abs(self.values) < _HUGE  # not where it is NaN
        steps, values = self.steps[is_kept], self.values[is_kept]
        is_last = np.append(np.diff(steps) > 0, True)[: len(steps)]
        return Curve(steps[is_last], values[is_last])


_EMPTY = Curve(np.empty(0, np.int64), np.empty(0))


@dataclass(eq=False)
class Run:
    """Run holds what a run left in its folder.

    Attributes:
        config: its config.yaml as plain data; empty where there is none.
        state: DONE, UNFINISHED or FAILED.
        figures: the figures of metrics.json, NaN where one is no number; empty unless the run is done.
        curves: every column of metrics.csv, by its name.
        error: why the run failed, in one line.
        stopped_at: the optimizer step at which a signal stopped it, or 0.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    state: str = UNFINISHED
    figures: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    error: str = ""
    stopped_at: int = 0

    @cache  # noqa: B019  # a report keeps its runs until the process ends
    def learned_from(self, *without: str) -> frozenset[tuple[str, str]]:
        """Return the keys and values that decide what the run learns, without some groups and keys."""
        return frozenset(learned_from(self.config, *without).items())

    def curve(self, metric: str) -> Curve:
        """Return the curve of a metric, empty where the run has not logged it."""
        return self.curves.get(metric, _EMPTY)

    @cached_property
    def last_step(self) -> int:
        """The last optimizer step that the run logged, or at which a signal stopped it; 0 where neither is known."""
        return max([self.stopped_at, *(int(curve.steps[-1]) for curve in self.curves.values() if len(curve.steps))])

    @cached_property
    def has_begun(self) -> bool:
        """Whether it is more than a job whose folder was made: its config is then that of a run, with all values."""
        return is_run(self.folder)

    @property
    def progress(self) -> str:
        """How far a run is that is not finished: it "is running (step 40)", "was stopped at step 40" or not started."""
        if state(self.folder) is State.RUNNING:
            return f"is running (step {self.last_step})"
        if self.last_step:
            return f"was stopped at step {self.last_step}"
        return "was stopped before its first logged step" if self.has_begun else "was not started"

    @cached_property
    def tokens_per_step(self) -> float | None:
        """Tokens of an optimizer step, on all devices; None where the files do not say."""
        steps, tokens = self.figures.get("steps"), self.figures.get("tokens")
        if steps is not None and tokens is not None and steps > 0 and tokens > 0:
            return tokens / steps
        groups = [self.config.get(name) for name in ("data", "model", "trainer")]
        data, model, trainer = (group if isinstance(group, dict) else {} for group in groups)
        devices = trainer.get("devices", 1)
        factors: tuple[Any, ...] = (
            data.get("batch_size"),
            data.get("sequence_length") or model.get("max_position_embeddings"),
            trainer.get("accumulate_grad_batches", 1),
            trainer.get("num_nodes", 1),
            len(devices) if isinstance(devices, list) else devices,
        )
        if not all(type(factor) is int and 0 < factor < _MOST for factor in factors):
            return None
        return float(math.prod(factors))

    @cached_property
    def seconds(self) -> Curve:
        """Seconds of training up to each logged step, from the logged speed. Validation is left out."""
        speed = self.curve("perf/tokens_per_s").finite
        if not len(speed.steps) or self.tokens_per_step is None or not (speed.values > _SLOWEST).all():
            return _EMPTY
        tokens = np.diff(speed.steps, prepend=0) * self.tokens_per_step
        return Curve(speed.steps, np.cumsum(tokens / speed.values))

    def seconds_at(self, steps: np.ndarray) -> np.ndarray | None:
        """Return the seconds of training at some steps, interpolated; None where no speed was logged."""
        if not len(self.seconds.steps):
            return None
        return np.interp(steps, np.append(0, self.seconds.steps), np.append(0.0, self.seconds.values))


def run_folders(typed: Sequence[str]) -> list[Path]:
    """Return the folders of all runs in or below some folders, in order and each once.

    Args:
        typed: folders, or globs of folders. A folder that has such a name is taken before a glob.

    Raises:
        UserError: there is no such folder.
    """
    found: dict[Path, None] = {}
    for each in typed:
        places = [each] if os.path.exists(each) else sorted(glob.glob(each, recursive=True))
        if not places:
            remedy = f"give folders of runs or of sweeps{list_remedy('runs', each)}"
            raise UserError(f"runs={each}: no such folder: {remedy}")
        for place in places:
            found |= dict.fromkeys(_below(Path(place)))
    return list(found)


def no_runs(typed: Sequence[str]) -> UserError:
    """Return the error of folders in which there are no runs."""
    if (file := next((each for each in typed if os.path.isfile(each)), None)) is not None:
        around = os.path.dirname(file) or "."
        remedy = f"runs={around}" if CSV_NAME in os.listdir(around) else "the folder of a run or of a sweep"
        return UserError(f"runs={file}: a file: give {remedy}")
    if closed := [each for each in typed if os.path.isdir(each) and not os.access(each, os.R_OK)]:
        return UserError(f"runs={closed[0]}: cannot be read: check its permissions")
    return UserError(f"runs={','.join(typed)}: no {CSV_NAME} below: give run folders, or a sweep's folder")


def _below(place: Path) -> Iterator[Path]:
    for name, folders, files in os.walk(place):
        folder = Path(name)
        is_here = CSV_NAME in files or (CONFIG_NAME in files and is_run(folder))
        if not is_here and RECORD in folders:  # a job that failed before it wrote its config, or never began
            is_here = ERROR_NAME in files or any((parent / SWEEP_RECORD).is_file() for parent in (*folder.parents,)[:2])
        folders[:] = sorted(
            each for each in folders if not each.startswith(".") and not (is_here and each in _NO_RUNS_INSIDE)
        )
        if is_here:
            yield folder


def read_record(folder: Path) -> dict[str, Any]:
    """Read the config that Hydra recorded in the folder of a job, before the run filled in what it finds out.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / RECORD / CONFIG_NAME
    return of_this_version(read_yaml(path, _NAMED_BY_FOLDER)) if path.is_file() else {}


def _read_curves(path: Path) -> dict[str, Curve]:
    """Read every column of a metrics.csv.

    Raises:
        UserError: the file cannot be read, is damaged, or a cell is no number.
    """
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for row in read_metrics(path):
        if len(row["step"]) > 12:
            raise UserError(f"{path}: damaged (a step of {len(row['step'])} digits): {_REMEDY}")
        step = int(row["step"])
        for name, text in row.items():
            if name == "step":
                continue
            steps, values = columns.setdefault(name, ([], []))
            try:
                values.append(float(text))
            except ValueError:
                raise UserError(f"{path}: {name} of step {step} is {text!r}, no number: {_REMEDY}") from None
            steps.append(step)
    return {
        name: Curve(np.array(steps, np.int64), np.array(values, float)) for name, (steps, values) in columns.items()
    }


def _number(value: Any) -> float:
    """Return a value of metrics.json as a number; NaN where it is none."""
    return float(value) if type(value) in (int, float) and abs(value) < 2**63 else math.nan


def read_run(folder: Path) -> Run:
    """Read the config, the figures and the curves of a run.

    Raises:
        UserError: a file is damaged.
    """
    run = Run(folder)
    path = folder / CONFIG_NAME
    run.config = of_this_version(read_yaml(path, _NAMED_BY_FOLDER)) if path.is_file() else read_record(folder)
    if (folder / CSV_NAME).is_file():
        run.curves = _read_curves(folder / CSV_NAME)
    if (folder / METRICS_NAME).is_file():
        figures = read_json(folder / METRICS_NAME, Record({}), "resume the run, which writes it again")
        run.figures = {name: _number(value) for name, value in figures.items()}
        run.state = DONE
    elif (line := told(folder)) is not None and is_stop(line):
        if at := re.search(r" at step (\d{1,12}) ", line):
            run.stopped_at = int(at[1])
    elif line is not None:
        run.state, run.error = FAILED, one_line(without_class_name(line), 300)
    return run


def read_runs(typed: Sequence[str], refuse: Callable[[UserError], None]) -> list[Run]:
    """Read all runs in or below some folders.

    Args:
        refuse: called with the error of each run whose files are damaged. Where it returns, that run is left out.

    Raises:
        UserError: there are no runs.
    """
    folders = run_folders(typed)
    if not folders:
        raise no_runs(typed)
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            refuse(error)
    return runs
