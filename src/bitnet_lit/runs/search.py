"""A search lets Optuna choose the values of each job (a trial) from the results of those before it.

The study lies in the sweep's folder (`optuna_study.py`), so a search that was killed goes on with it. Each trial is an
ordinary job, with a folder of its own (`job_folder.py`). A trial whose process died is taken up again: its job goes on
from its checkpoint, and the study gets the result. `sweep.n_trials` counts the trials of all starts.

A run that diverges is a bad result: its value is infinite, and the search learns from it. A job that failed for another
reason gives no value, and the next start tries its values again. No trial is ended early: the loss of a BitNet falls in
an S, slowly at first, so a comparison in the middle of a run ranks the trials wrongly.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from bitnet_lit import gpu_errors
from bitnet_lit.config import SweepConfig
from bitnet_lit.errors import TrainingStopped, UserError
from bitnet_lit.extras import needs
from bitnet_lit.files.foreign_json import read_json
from bitnet_lit.files.json_shapes import Record
from bitnet_lit.runs.devices import note_sharing
from bitnet_lit.runs.folder import ERROR_NAME, METRICS_NAME
from bitnet_lit.runs.grid import check, check_launcher, parsed_overrides, place, preview
from bitnet_lit.runs.job import Job
from bitnet_lit.runs.job_folder import State, state
from bitnet_lit.runs.job_names import identity
from bitnet_lit.runs.launch import Planned, launch
from bitnet_lit.runs.metric_names import check_metric
from bitnet_lit.runs.optuna_study import (
    STUDY_NAME,
    distribution,
    enqueue_failed,
    has_result,
    interrupted_trials,
    open_study,
    sampler_of,
)
from bitnet_lit.runs.sweep import stop_number
from bitnet_lit.runs.sweep_table import SweepTable

if TYPE_CHECKING:
    import optuna

_HUGE = 1e30  # a figure beyond it is a bad result, like one that is no number


class Search:
    """Runs the trials of a study.

    Args:
        sweeper: has Hydra's config and launcher.
        job: runs a trial.
        overrides: of the whole sweep.
    """

    def __init__(self, sweeper: BasicSweeper, job: Job, overrides: Sequence[Override]) -> None:
        assert sweeper.config is not None
        self.sweeper, self.job = sweeper, job
        self.sweep_dir = Path(sweeper.config.hydra.sweep.dir)
        self.study_path = self.sweep_dir / STUDY_NAME
        self.config = SweepConfig(**OmegaConf.to_container(sweeper.config.sweep))  # type: ignore[arg-type]
        fixed = {each.get_key_element(): each for each in overrides if not each.is_sweep_override()}
        self.fixed = [f"{key}={each.get_value_element_as_str()}" for key, each in fixed.items()]
        searched = {each.get_key_element(): each for each in overrides if each.is_sweep_override()}
        self.typed = {key: (each.input_line or "").partition("=")[2] for key, each in searched.items()}
        self.space = {key: distribution(each) for key, each in searched.items() if key not in fixed}
        if not self.space:
            raise UserError(
                "a search needs values to choose from: optim.learning_rate='tag(log, interval(1e-3, 1e-1))'"
            )

    def _keys(self) -> dict[str, list[str]]:
        """Return what the study searches, by key: text that is the same for the same search, and what was typed."""
        whole = {key: [str(each), self.typed[key]] for key, each in sorted(self.space.items())}
        fixed = identity(item for item in self.fixed if not item.startswith("sweep="))
        fixed |= {"metric": self.config.metric, "direction": self.config.direction}
        return whole | {key: [value, value] for key, value in fixed.items()}

    def _place(self, params: Mapping[str, Any]) -> Planned:
        values = [f"{key}={value}" for key, value in params.items()]
        (planned,) = place([[*self.fixed, *values]], self.sweep_dir, {key.lstrip("+") for key in self.space}, False)
        return planned

    def _checked(self, batch: Sequence[Mapping[str, Any]]) -> tuple[list[Planned], list[Any]]:
        """Place the trials with these values, and check their configs and that they will have the metric.

        Returns:
            The jobs, and the config of each or the error that it has.

        Raises:
            UserError: every config is wrong, or `check_metric` refuses `sweep.metric`.
        """
        planned = [self._place(params) for params in batch]
        configs = check(self.sweeper, self.job, planned, self.sweep_dir)
        for config in configs:
            if not isinstance(config, UserError):
                mix, has_callbacks = getattr(config.data, "mix", None) or (), bool(config.callbacks.extra)
                check_metric(self.config.metric, self.config.direction, mix, has_callbacks)
        return planned, configs

    def _example(self, number: int) -> Mapping[str, Any]:
        """Return values that a trial may have.

        Args:
            number: of trials that the study has.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return optuna.create_study(sampler=sampler_of(self.config, number)).ask(self.space).params

    def show(self) -> None:
        """Print what a search would do. The values of later trials are not known yet, so one trial stands for all."""
        import optuna

        trials: list[Any] = []
        if self.study_path.is_file():
            study = open_study(self.study_path, self.config, self._keys(), may_replace=False)
            trials = study.get_trials()
        planned, configs = self._checked([self._example(len(trials))])
        preview(self.job, planned, configs, self.sweep_dir)
        done = sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in trials)
        print(
            f"A search of {self.config.n_trials} trials, of which {done} are done. The job above is an example: values "
            "are chosen as results come in."
        )

    def run(self) -> None:
        """Run trials until `sweep.n_trials` have a value."""
        from optuna.trial import TrialState

        if not self.study_path.is_file():
            self._checked([self._example(0)])  # a mistake in the command leaves no study
        study = open_study(self.study_path, self.config, self._keys())
        trials = study.get_trials()
        open_trials = interrupted_trials(study, trials, self.space.keys())
        states = {number: self._place(params).state for number, params in open_trials}
        open_trials.sort(key=lambda trial: states[trial[0]] is State.RUNNING)  # it may have ended when its turn comes
        enqueue_failed(study, trials)
        done = sum(trial.state == TrialState.COMPLETE for trial in trials)
        left = self.config.n_trials - done
        print(
            f"search: {self.sweep_dir}: {done} of {self.config.n_trials} trials done, {len(open_trials)} to go on with",
            file=sys.stderr,
        )
        note_sharing(cast(DictConfig, self.sweeper.config))
        at_once = max(1, int(OmegaConf.select(cast(DictConfig, self.sweeper.config), "hydra.launcher.n_jobs") or 1))
        names: list[str] = []
        while left > 0 and stop_number(self.sweep_dir) is None and not gpu_errors.is_lost():
            batch = open_trials[: min(left, at_once)]
            open_trials = open_trials[len(batch) :]
            while len(batch) < min(left, at_once):
                asked = study.ask(self.space)
                batch.append((asked.number, asked.params))
            names += self._run_batch(study, batch)
            left -= len(batch)
        SweepTable.jobs = names
        if self._print_best(study):
            self.job.failures.clear()  # a trial that diverged is none; the table names those that failed
        elif stop_number(self.sweep_dir) is None:
            self.job.failures.insert(0, TrainingStopped(f"{self.sweep_dir}: no trial has a result"))

    def _run_batch(self, study: optuna.Study, batch: Sequence[tuple[int, dict[str, Any]]]) -> list[str]:
        """Run trials, and tell the study their values.

        Returns:
            The names of the jobs, without those that diverged: a bad result is not a failure of the sweep.
        """
        from optuna.trial import TrialState

        params = [each for _, each in batch]
        try:
            planned, _ = self._checked(params)
        except UserError:
            if not has_result(study):
                raise  # the first trials: most likely every other one would be refused too
            planned = [self._place(each) for each in params]
        assert self.sweeper.launcher is not None
        waiting = {one.folder: one for one in planned if one.state is not State.DONE}
        if waiting:
            launch(self.sweeper.launcher, list(waiting.values()), self.sweep_dir, batch[0][0])
        names = []
        for (number, _), one in zip(batch, planned, strict=True):
            assert one.folder is not None
            value = self._value(study, one.folder)
            if value is None and (stop_number(self.sweep_dir) is not None or state(one.folder) is State.RUNNING):
                names.append(one.folder.name)
                continue  # the next start goes on with this trial
            if value is None:
                study.tell(number, state=TrialState.FAIL)
            else:
                study.tell(number, value)
            if value is None or math.isfinite(value):
                names.append(one.folder.name)
        return names

    def _value(self, study: optuna.Study, folder: Path) -> float | None:
        """Return the result of a job; infinity where it diverged, None where it failed for another reason.

        Raises:
            UserError: the run has no such figure.
        """
        worst = math.inf if self.config.direction == "minimize" else -math.inf
        if state(folder) is State.DONE:
            metrics = read_json(folder / METRICS_NAME, Record({}), "remove it")
            numbers = {name: value for name, value in metrics.items() if type(value) in (int, float)}
            if self.config.metric not in numbers:
                goes_on = ", in another hydra.sweep.dir" if has_result(study) else "; the same line with it goes on"
                raise UserError(
                    f"sweep.metric={self.config.metric}: not in {folder / METRICS_NAME}: give one of "
                    f"{', '.join(numbers)}{goes_on}"
                )
            value = numbers[self.config.metric]
            return float(value) if abs(value) < _HUGE else worst  # NaN is not smaller
        try:
            error = (folder / ERROR_NAME).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        return worst if error.startswith("Diverged: ") else None

    def _print_best(self, study: optuna.Study) -> bool:
        """Print the best trial, and return whether there is one."""
        from optuna.trial import TrialState

        values = [
            (trial.value, trial)
            for trial in study.get_trials(states=(TrialState.COMPLETE,))
            if trial.value is not None and math.isfinite(trial.value)
        ]
        if not values:
            return False
        choose = min if self.config.direction == "minimize" else max
        value, best = choose(values, key=lambda pair: pair[0])
        params = " ".join(f"{key}={each}" for key, each in best.params.items())
        print(f"best of {len(values)} trials: {self.config.metric}={value:.4f} with {params}")
        return True


def search(sweeper: BasicSweeper, job: Job, arguments: Sequence[str]) -> None:
    """Run a search: `sweep.n_trials` jobs whose values Optuna chooses.

    Raises:
        UserError: Optuna is not installed, another process runs this sweep, or its folder has the study of another one.
    """
    assert sweeper.config is not None
    with needs("optuna", "sweep=optuna_..."):
        import optuna  # noqa: F401
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise UserError(
            "a search under torchrun or srun: each rank would choose values of its own: start it as one process "
            "(trainer=ddp starts the other ranks of a job)"
        )
    SweepTable.check_folder()
    SweepTable.flags = job.flags
    overrides = parsed_overrides(sweeper, arguments)
    found = Search(sweeper, job, list({each.get_key_element(): each for each in overrides}.values()))
    if found.config.dry_run:
        found.show()
    else:
        check_launcher(sweeper.config)
        found.run()
