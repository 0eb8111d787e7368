"""`Job` is what Hydra calls with the composed config: once for a run, and for each job of a sweep.

In a sweep it looks into the job's folder first (`job_folder.py`): a job that is done returns its loss, and one that is
half done goes on. So it does not matter which sweeper or launcher started it, or in which process.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

from bitnet_lit.errors import TrainingStopped
from bitnet_lit.runs.devices import take_gpus
from bitnet_lit.runs.folder import can_be_resumed
from bitnet_lit.runs.job_folder import State, check_unchanged, final_loss, is_of, state
from bitnet_lit.runs.ranks import command_of_a_job, rank
from bitnet_lit.runs.sweep import RUNS_ELSEWHERE, run_job
from bitnet_lit.terminal import lines_named


@dataclass(frozen=True)
class ResumableTask:
    """Holds what a command gives beside its task so that a sweep of it can be repeated and tried dry."""

    resume: Callable[[str, Any], tuple[Any, list[str]]]
    """Called with the folder of a half-done job and the config that the job would begin with. It returns the config
    to go on with, and the overrides that start another rank of that run."""
    preview: Callable[[Sequence[tuple[str, Path, State, Any]]], None]
    """Called by `sweep.dry_run=true` with name, folder, state and config of each job. It checks all that can be checked
    without training, and prints it."""


@dataclass
class Job:
    """Composes a job's config and calls the command's task with it."""

    module: str
    """The module of the command, as `python -m` takes it."""
    task: Callable[[Any], Any]
    build: Callable[[DictConfig], Any]
    """Builds the dataclass from the composed config. It raises UserError where a value does not fit."""
    resumable: ResumableTask | None
    """None: the jobs of this command leave nothing that can be resumed."""
    typed: list[str]
    """`sys.argv` as the user typed it."""
    flags: list[str]
    """The flags of Hydra that the user typed, without that of a sweep."""
    main_process: int = field(default_factory=os.getpid)
    failures: list[Exception] = field(default_factory=list)

    def __call__(self, cfg: DictConfig) -> Any:
        sys.argv = self.typed  # Lightning starts further ranks with the same command
        hydra = HydraConfig.get()
        if hydra.mode != RunMode.MULTIRUN:
            try:
                return self.task(self.build(cfg))
            except Exception as error:  # Hydra would print a message of its own first
                self.failures.append(error)
                return error
        result = self._run_in_sweep(cfg, Path(hydra.runtime.output_dir), Path(hydra.sweep.dir), hydra.overrides.task)
        if result == float("inf"):
            self.failures.append(TrainingStopped("jobs of the sweep failed"))
        return result

    def _run_in_sweep(self, cfg: DictConfig, folder: Path, sweep_dir: Path, overrides: list[str]) -> Any:
        is_beside_others = os.getpid() != self.main_process and _is_beside_others()
        if is_beside_others and "trainer" in cfg:
            take_gpus(sweep_dir, cfg.trainer.accelerator, cfg.trainer.devices)
        is_own = self.resumable is not None and is_of(folder, overrides)
        found = state(folder) if is_own else State.NEW
        if rank() and found is State.RUNNING:  # the first rank of this very job holds the lock
            found = State.HALF_DONE if can_be_resumed(folder) else State.NEW

        if found is State.RUNNING:
            print(f"sweep: {folder}: {RUNS_ELSEWHERE}: left alone", file=sys.stderr)
            return float("inf")

        def work() -> Any:
            if found in (State.DONE, State.HALF_DONE):
                check_unchanged(folder, cfg)
            if found is State.DONE:
                return final_loss(folder)
            config = self.build(cfg)
            if found is not State.HALF_DONE or self.resumable is None:
                with command_of_a_job(self.module, self.flags):
                    return self.task(config)
            config, resumed = self.resumable.resume(str(folder), config)
            with command_of_a_job(self.module, self.flags, resumed):
                return self.task(config)

        with lines_named(os.path.relpath(folder, sweep_dir) if is_beside_others else ""):
            return run_job(work, folder, sweep_dir, os.getpid() == self.main_process, is_own)

    @contextlib.contextmanager
    def as_if_it_ran(self, composed: DictConfig, folder: Path) -> Iterator[DictConfig]:
        """Wrap the check of a job that does not run: Hydra says of itself what it says while the job runs.

        Args:
            composed: the job's config, with Hydra's own part, which is removed. A copy would take as long as all else.
            folder: the job's folder, which may not exist.

        Yields:
            The config as the job gets it.
        """
        before = HydraConfig.instance().cfg
        with read_write(composed.hydra.runtime), open_dict(composed.hydra.runtime):
            composed.hydra.runtime.output_dir = os.path.abspath(folder)
        HydraConfig.instance().set_config(composed)
        with read_write(composed), open_dict(composed):
            del composed["hydra"]
        try:
            yield composed
        finally:
            HydraConfig.instance().cfg = before


def _is_beside_others() -> bool:
    """Return whether other jobs of the sweep run on this machine at the same time."""
    return str(HydraConfig.get().launcher._target_).rpartition(".")[2] == "JoblibLauncher"
