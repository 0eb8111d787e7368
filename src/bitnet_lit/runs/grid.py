"""A grid runs every combination of the swept values, and leaves out what earlier starts of the sweep have done.

Before anything runs every job is composed and its config checked. So a mistake that all jobs share ends the command at
once with status 2, and a job that is done is compared with what its overrides mean now (`job_folder.py`).
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from bitnet_lit.errors import UserError
from bitnet_lit.runs.devices import note_sharing
from bitnet_lit.runs.folder import SWEEP_RECORD, is_taken
from bitnet_lit.runs.job import Job
from bitnet_lit.runs.job_folder import State, check_unchanged, job_folders, recorded_overrides, state
from bitnet_lit.runs.job_names import identity, job_name, swept_keys
from bitnet_lit.runs.launch import Planned, launch
from bitnet_lit.runs.ranks import rank
from bitnet_lit.runs.sweep_table import SweepTable

_OWN_SUBDIR = "${hydra.job.num}"  # conf/train.yaml; another value is the user's


def parsed_overrides(sweeper: BasicSweeper, arguments: Sequence[str]) -> list[Override]:
    """Parse the overrides of a sweep: those of `hydra.sweeper.params`, then the typed ones, which take precedence."""
    assert sweeper.hydra_context is not None
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    return parser.parse_overrides([*params, *arguments])


def combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """Return the overrides of every job of a grid; a combination that is typed twice is there once.

    Raises:
        UserError: a value is an interval, which has no end of values.
    """
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise UserError(
                f"{override.input_line}: a grid takes values (a,b,c or range(...)); an interval is searched by "
                "sweep=optuna_lr"
            )
    jobs: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for job in BasicSweeper.split_arguments(list(overrides), None)[0]:
        jobs.setdefault(tuple(identity(job).items()), job)
    return list(jobs.values())


def place(jobs: Iterable[list[str]], sweep_dir: Path, swept: set[str], has_own_subdir: bool) -> list[Planned]:
    """Give each job its folder: the one in which an earlier start ran it, or a new one.

    Args:
        jobs: the overrides of each job.
        swept: the keys that the sweep varies.
        has_own_subdir: whether the folders of new jobs are named by the user's `hydra.sweep.subdir`.

    Raises:
        UserError: the folder holds the results of another job.
    """
    known = {tuple(found.items()): folder for folder, found in job_folders(sweep_dir) if found is not None}
    planned = []
    for job in jobs:
        wanted = identity(job)
        folder = known.get(tuple(wanted.items()))
        if folder is None and has_own_subdir:
            planned.append(Planned(job, None, State.NEW))
            continue
        if folder is None:
            folder = sweep_dir / job_name(job, swept)
            if is_taken(folder):
                raise UserError(f"{folder}: {_difference(folder, wanted)}: give another hydra.sweep.dir")
        planned.append(Planned(job, folder, state(folder)))
    return planned


def _difference(folder: Path, wanted: dict[str, str]) -> str:
    """Say how the job in a folder differs from the wanted one."""
    recorded = recorded_overrides(folder)
    if recorded is None:
        return "holds a run that this sweep did not start"
    was = identity(recorded)
    key = next(key for key in [*was, *wanted] if was.get(key) != wanted.get(key))
    before = f"with {key}={was[key]}" if key in was else f"without {key}"
    now = f"{key}={wanted[key]}" if key in wanted else f"without {key}"
    return f"holds another job ({before}, and this one is {now})"


def composed(sweeper: BasicSweeper, overrides: Sequence[str]) -> DictConfig:
    """Compose the config of a job, with Hydra's own part."""
    assert sweeper.hydra_context is not None and sweeper.config is not None
    return sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, list(overrides))


def check(sweeper: BasicSweeper, job: Job, planned: Sequence[Planned], sweep_dir: Path) -> list[Any]:
    """Check the config of every job, and compare the results that are there with what the overrides mean now.

    Returns:
        The config of each job, or the error that its config has. Such a job fails when it runs, and the others run.

    Raises:
        UserError: the config of every job is wrong, or results are of another config.
    """
    configs: list[Any] = []
    errors: list[UserError] = []
    for one in planned:
        whole = composed(sweeper, one.launched(sweep_dir))
        folder = one.folder or sweep_dir / "job"
        with job.as_if_it_ran(whole, folder) as config:
            if one.state in (State.DONE, State.HALF_DONE):
                check_unchanged(folder, config)
            try:
                configs.append(job.build(config))
            except UserError as error:
                errors.append(error)
                configs.append(error)
    if errors and len(errors) == len(planned):
        raise errors[0]
    return configs


def preview(
    job: Job, planned: Sequence[Planned], configs: Sequence[Any], sweep_dir: Path, is_sweep: bool = True
) -> None:
    """Print what each job would take. A single run is a sweep of one job, and may be one that is resumed."""
    assert job.resumable is not None
    rows = []
    for one, config in zip(planned, configs, strict=True):
        folder, found = one.folder or sweep_dir / "job", one.state
        name = folder.relative_to(sweep_dir).as_posix() if is_sweep else "run"
        if found is State.HALF_DONE and not isinstance(config, UserError):
            config, _ = job.resumable.resume(str(folder), config)
        elif getattr(config, "resume", None) is not None:
            name, folder, found = config.resume, Path(config.run_dir), State.HALF_DONE
        rows.append((name, folder, found, config))
    job.resumable.preview(rows)


def check_launcher(config: DictConfig) -> None:
    """Refuse to send jobs to SLURM from a machine that has none.

    Raises:
        UserError: there is no srun.
    """
    if str(config.hydra.launcher._target_).endswith(".SlurmLauncher") and shutil.which("srun") is None:
        raise UserError(
            "launcher=submitit_slurm: no srun on this machine: start the sweep on a login node of the cluster, or try "
            "it with launcher=submitit_local"
        )


def sweep(sweeper: BasicSweeper, job: Job, arguments: Sequence[str]) -> list[Any]:
    """Run a sweep: every combination of the values of `arguments` that is not done yet.

    Returns:
        What the launcher returns, in batches.

    Raises:
        UserError: another process runs this sweep, or the config of every job is wrong.
    """
    assert sweeper.config is not None and sweeper.launcher is not None
    config = sweeper.config
    SweepTable.check_folder()
    SweepTable.flags = job.flags
    sweep_dir = Path(config.hydra.sweep.dir)
    overrides = parsed_overrides(sweeper, arguments)
    subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[call-overload, index]
    swept = swept_keys(arguments, sweeper.params or {})
    planned = place(combinations(overrides), sweep_dir, swept, has_own_subdir=subdir != _OWN_SUBDIR)
    configs = check(sweeper, job, planned, sweep_dir)
    if config.sweep.dry_run:
        preview(job, planned, configs, sweep_dir, is_sweep=bool(swept))
        return []
    check_launcher(config)
    if not rank():
        counts = Counter(one.state.value for one in planned)
        states = ", ".join(f"{counts[each.value]} {each.value}" for each in State if counts[each.value])
        print(f"sweep: {sweep_dir}: {len(planned)} job{'s' * (len(planned) != 1)}, {states}", file=sys.stderr)
        note_sharing(config)
        sweep_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, sweep_dir / SWEEP_RECORD)
    SweepTable.jobs = [one.folder.relative_to(sweep_dir).as_posix() for one in planned if one.folder] or None
    # What another process trains comes last, and has perhaps ended when its turn comes.
    in_order = sorted(planned, key=lambda one: one.state is State.RUNNING)
    waiting = [one for one in in_order if one.state is not State.DONE]
    results: list[Sequence[Any]] = []
    most = sweeper.max_batch_size or 0
    at_once = most if most > 0 else max(1, len(waiting))
    for start in range(0, len(waiting), at_once):
        batch = waiting[start : start + at_once]
        results.append(launch(sweeper.launcher, batch, sweep_dir, sum(len(each) for each in results)))
    return results
