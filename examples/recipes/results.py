"""The results of the study: results.jsonl, one line of JSON for each run, written as soon as the run has ended.

The file alone says what is done. So a study goes on from it on another machine too, where the run folders are missing.
A line that a kill cut off is left out, and its run is read again from its folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from plan import BASE, COMBINED, DENSE_RUN, NO_OPTIONS, SAME_TIME, SEARCH, SPEED, Plan, Sweep, by_key

from bitnet_lit.errors import UserError, one_line
from bitnet_lit.reports.statistics import Estimate
from bitnet_lit.reports.weight_sizes import quant_config, weight_sizes
from bitnet_lit.runs.folder import CHECKPOINTS, ERROR_NAME, MODEL, MODEL_LAST, locked
from bitnet_lit.runs.history import DONE, FAILED, Run, read_runs
from bitnet_lit.runs.job_folder import State as JobState
from bitnet_lit.runs.job_folder import job_folders, state
from bitnet_lit.runs.job_names import identity

FILE_NAME = "results.jsonl"
DIVERGED = "diverged"
DENSE_BITS = 16  # of a weight that is not quantized, as models are shipped
TERNARY_BITS = 2  # of a ternary weight, as `export format=packed` writes it

Record = dict[str, Any]


def _figures(run: Run) -> Record:
    speeds = run.curve("perf/tokens_per_s").finite.values
    sizes, quant = weight_sizes(run.config, DENSE_BITS), quant_config(run.config)
    padding = TERNARY_BITS - quant.scheme.code_bits if quant is not None and quant.scheme.is_ternary else 0
    return {
        "state": DONE,
        "loss": run.figures["val/loss"],
        "bits_per_byte": run.figures.get("val/bits_per_byte"),
        "tokens": run.figures.get("tokens"),
        "tokens_per_s": float(np.median(speeds)) if len(speeds) else None,
        "parameters": None if sizes is None else sizes.parameters,
        "bytes": None if sizes is None else sizes.num_bytes + sizes.projections * padding / 8,
    }


def seed_of(overrides: dict[str, str]) -> int:
    """Return the seed of a job."""
    return int(overrides.get("seed", "1"))


def _record(sweep: Sweep, folder: Path, overrides: dict[str, str]) -> Record | None:
    """Return the line of a job that has ended; None where it has not, or failed for a reason that may go away."""
    found = state(folder)
    if found not in (JobState.DONE, JobState.FAILED, JobState.HALF_DONE):
        return None
    (run,) = read_runs([str(folder)], lambda error: None) or (None,)
    if run is None:
        return None
    record: Record = {"sweep": sweep.name, "job": folder.name, "seed": seed_of(overrides)}
    values = {key: text for key, text in overrides.items() if key in sweep.space}
    if run.state == DONE and math.isfinite(run.figures.get("val/loss", math.nan)):
        return record | _figures(run) | {"values": values, "overrides": overrides, "folder": str(folder)}
    try:
        error = (folder / ERROR_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        error = ""
    if run.state == DONE or (run.state == FAILED and error.startswith("Diverged: ")):
        return record | {
            "state": DIVERGED,
            "loss": None,
            "error": one_line(error),
            "values": values,
            "overrides": overrides,
            "folder": str(folder),
        }
    return None


def _remove_weights(folder: Path) -> None:
    """Remove checkpoints and models of a run that has ended: those of a study would fill a disk.

    A process that has just written its result may still hold the folder's lock. Then the next call removes them.
    """
    if any((folder / name).exists() for name in (CHECKPOINTS, MODEL, MODEL_LAST)):
        with contextlib.suppress(UserError, OSError), locked(folder):
            for name in (CHECKPOINTS, MODEL, MODEL_LAST):
                shutil.rmtree(folder / name, ignore_errors=True)


class Results:
    """The lines of results.jsonl, and how they are collected from the folders of the runs.

    Args:
        out: the folder of the study.
        machine: what a new line says of the machine and the versions.
    """

    def __init__(self, out: Path, machine: str = "") -> None:
        self.out, self.path, self.machine = out, out / FILE_NAME, machine
        self.records: dict[tuple[str, str], Record] = {}  # by sweep and job
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            for line in text.splitlines():
                with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                    record = json.loads(line)
                    self.records[record["sweep"], record["job"]] = record
            if text and not text.endswith("\n"):  # a kill cut the last line off
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n")

    def of(self, sweep: str) -> list[Record]:
        """Return the lines of a sweep."""
        return [record for (name, _), record in self.records.items() if name == sweep]

    def is_complete(self, sweep: Sweep) -> bool:
        """Return whether every run of a sweep has a result."""
        if sweep.what == SEARCH:
            return len(self.of(sweep.name)) >= sweep.jobs
        return not self.missing_seeds(sweep)

    def missing_seeds(self, sweep: Sweep) -> list[int]:
        """Return the seeds of a grid that have no result yet."""
        done = {record["seed"] for record in self.of(sweep.name)}
        return [seed for seed in sweep.seeds if seed not in done]

    def check(self, plan: Plan) -> None:
        """Refuse to go on with results that the plan would not make: a table would compare what is not alike.

        Raises:
            UserError: a run had other overrides, or a search would find another best after its runs.
        """
        for sweep in plan.sweeps:
            search = plan.by_name.get(sweep.best_of or "")
            best = self.best_values(sweep.best_of) if sweep.best_of else None
            remedy = f"give another out=, or remove the lines of {sweep.name} from {FILE_NAME}"
            records = self.of(sweep.name)
            chosen = self.combination(plan, sweep) if records else {}
            fixed = (best or {}) | sweep.fixed | chosen  # as Study types them
            for record in records:
                if search is not None and not self.is_complete(search):
                    raise UserError(
                        f"trials={search.jobs}: {sweep.name} has results with the best of {len(self.of(search.name))} "
                        f"trials: give trials={len(self.of(search.name))}, or {remedy[5:]}"
                    )
                if (other := _other(record, sweep, fixed, best is not None)) is not None:
                    raise UserError(f"out={self.out}: {sweep.name} has a result {other}: {remedy}")

    def elsewhere(self, sweep: Sweep) -> int:
        """Return how many runs of a sweep have a result here and their folder on another machine."""
        return sum(not (self.out / sweep.name / job).is_dir() for name, job in self.records if name == sweep.name)

    def best(self, search: str) -> Record | None:
        """Return the trial of a search with the least loss; None where no trial has one."""
        finite = [record for record in self.of(search) if record["state"] == DONE]
        return min(finite, key=lambda record: record["loss"], default=None)

    def best_values(self, search: str) -> dict[str, str] | None:
        """Return the values of the best trial, with two digits, as they are typed for the runs after it."""
        best = self.best(search)
        return None if best is None else {key: _rounded(text) for key, text in best["values"].items()}

    def change(self, sweep: str, base: str, figure: str = "loss") -> Estimate | None:
        """Return the mean difference of a figure between runs of one seed; None where no two runs have it."""
        one, other = (
            {record["seed"]: record[figure] for record in self.of(name) if record.get(figure) is not None}
            for name in (sweep, base)
        )
        values = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
        return Estimate.of(values) if values else None

    def speed(self, recipe: str, quant: str) -> float | None:
        """Return the tokens/s of a twin alone on a GPU; None where they were not measured, or the run was too short."""
        return next((record.get("tokens_per_s") for record in self.of(f"{recipe}/{quant}/{SPEED}")), None)

    def combination(self, plan: Plan, sweep: Sweep) -> dict[str, str]:
        """Return the overrides of the combination whose options a sweep has; {} if it has no such options.

        They are those of all options that helped the twin of the combination, or that its first run had. An option
        helps if the whole interval of its change lies below 0. Of options that clash the better one is taken.
        """
        combined = plan.by_name.get(sweep.options_of or "")
        if combined is None:
            return {}
        had = next((record.get("overrides") for record in self.of(combined.name)), None)
        if had:  # what helps may have changed since, by further seeds or a failed option
            return self._combined(plan, had)
        helped: list[tuple[float, str]] = []
        for need in (plan.by_name[name] for name in combined.needs if name in plan.by_name):
            change = self.change(need.name, f"{need.recipe}/{need.quant}/{BASE}")
            if need.what in NO_OPTIONS or change is None or not plan.portable(need.what, combined.recipe):
                continue
            if change.mean + (change.half_width or 0) < 0:
                helped.append((change.mean, need.what))
        chosen: dict[str, str] = {}
        for _, name in sorted(helped):
            option = by_key(plan.option(name))
            if not _clash(option, chosen):
                chosen |= option
        return chosen

    def _combined(self, plan: Plan, had: dict[str, str]) -> dict[str, str]:
        """Return the overrides of all options of a plan that a run had."""
        chosen: dict[str, str] = {}
        for option in (by_key(plan.option(name)) for name in plan.settings["options"]):
            if all(
                key in had if DENSE_RUN in text else identity([f"{key}={text}"]).items() <= had.items()
                for key, text in option.items()
            ):
                chosen |= option
        return chosen

    def collect(self, sweep: Sweep) -> list[Record]:
        """Write a line for each run of a sweep that has ended since the last call, and return these lines."""
        folder = self.out / sweep.name
        new = []
        for job, overrides in job_folders(folder) if folder.is_dir() else ():
            is_known = (sweep.name, job.name) in self.records
            if sweep.what != SEARCH and overrides is not None:  # a teacher that was trained again has a new name
                is_known |= seed_of(overrides) not in self.missing_seeds(sweep)
            if not is_known and overrides is not None and (record := _record(sweep, job, overrides)) is not None:
                self._write(record | {"machine": self.machine})
                new.append(record)
                is_known = True
            if is_known and sweep.what != BASE:  # the base runs stay, as teachers and to be looked at
                _remove_weights(job)
        return new

    def _write(self, record: Record) -> None:
        self.records[record["sweep"], record["job"]] = record
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _clash(one: dict[str, str], other: dict[str, str]) -> bool:
    """Return whether options set one key, or one chooses a scheme and the other sets a key of its own scheme.

    Every scheme has `quant.start_at`.
    """
    of_scheme = [any(key.startswith("quant.") and key != "quant.start_at" for key in each) for each in (one, other)]
    return bool(one.keys() & other.keys()) or ("quant" in one and of_scheme[1]) or ("quant" in other and of_scheme[0])


def _other(record: Record, sweep: Sweep, fixed: dict[str, str], has_best: bool) -> str | None:
    """Return how the overrides of a result differ from those that the plan would give its run; None where they do not.

    What the results of other sweeps decide is not compared, nor is where the data lies.

    Args:
        fixed: the overrides that the plan gives each run of the sweep.
        has_best: whether the values of the best trial, from which the sweep begins, are among them.
    """
    free = {"data.dir", "callbacks", "sweep", "seed"} | {key for key, value in fixed.items() if DENSE_RUN in value}
    free |= {"trainer.max_tokens"} if sweep.what == SAME_TIME else set()
    was: dict[str, str] = record.get("overrides") or {}
    free |= set() if has_best else record["values"].keys() | sweep.space.keys()
    wanted = identity(f"{key}={value}" for key, value in fixed.items() if key not in free)
    for key in (wanted if sweep.what == COMBINED else [*was, *wanted]) if was else ():
        if key not in free and was.get(key) != wanted.get(key):
            before = f"with {key}={was[key]}" if key in was else f"without {key}"
            return (
                f"{before}, and this plan has {key}={wanted[key]}" if key in wanted else f"{before}, this plan has none"
            )
    return None


def _rounded(text: str) -> str:
    try:
        return text if text.lstrip("-").isdecimal() else f"{float(text):.2g}"
    except ValueError:
        return text
