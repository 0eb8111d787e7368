"""`python -m bitnet_lit.train` trains a model on shards, and writes a run folder with a model folder in it.

In a sweep (`-m`) each job returns its final validation loss to Hydra's sweeper, so a sweeper that optimizes can use it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bitnet_lit.entry_point import run_command

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from omegaconf import DictConfig

    from bitnet_lit.config import TrainConfig
    from bitnet_lit.errors import UserError
    from bitnet_lit.runs.job_folder import State

# Hydra composes the overrides of a resume before the run's config.yaml is read. These open groups accept any key, and
# `resume_config` then checks the keys against that config.yaml.
_OPENED = ["optim=custom", "schedule=custom", "data=custom", "model=custom"]


def _train(config: TrainConfig) -> float:
    from bitnet_lit.training.run import train

    return float(train(config)["val/loss"])


def _configure(cfg: DictConfig) -> TrainConfig:
    """Return the config of a new run, or the config that a resumed run began with, changed by what was typed."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from bitnet_lit.composed_config import fit_mode, to_object
    from bitnet_lit.overrides import key_and_value
    from bitnet_lit.training.initialize import check_typed_network, sizes_are_given
    from bitnet_lit.training.resume import resume_config

    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)  # interpolations are not resolved
    overrides = {item: key_and_value(item)[0] for item in typed}
    if cfg.resume is None:
        with sizes_are_given(None if cfg.init_from is None else f"init_from={cfg.init_from}", overrides.values()):
            config: TrainConfig = to_object(fit_mode(cfg, typed))
        if config.init_from is not None:
            check_typed_network(config, overrides.values())
        return config
    return resume_config(
        cfg.resume, [item for item, key in overrides.items() if key != "resume" and item not in _OPENED]
    )


def _resume(folder: str, config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Return the config that a half-done job of a sweep goes on with, and the overrides that start its other ranks.

    Args:
        config: what the job would begin with. The classes that it names may be imported.
    """
    from bitnet_lit.config.slots import as_values
    from bitnet_lit.runs.go_on import foreign_classes, resume_overrides
    from bitnet_lit.training.resume import resume_config

    overrides = resume_overrides(folder, foreign_classes({**as_values(config), "schemes": config.schemes}))
    return resume_config(folder, overrides[1:]), overrides


def _preview(jobs: Sequence[tuple[str, Path, State, TrainConfig | UserError]]) -> None:
    from bitnet_lit.training.preview import preview

    preview(jobs)


def _place(overrides: list[str], is_sweep: bool) -> list[str]:
    """Return overrides that set Hydra's folder to the run folder: a typed `run_dir`, or that of the resumed run.

    Hydra's record of a resume goes to its own folder, `.hydra_resume`. A path with `${` is refused, because Hydra would
    replace `${...}` by the content of a variable, and the path may come from somebody else.

    Args:
        overrides: what the user typed.

    Raises:
        UserError: the folder cannot be a run folder, or `-m` is missing.
    """
    from bitnet_lit.errors import UserError
    from bitnet_lit.overrides import quoted, readable
    from bitnet_lit.runs.folder import RESUME_RECORD, find_run
    from bitnet_lit.runs.ranks import rank

    typed = dict(map(readable, overrides))
    for key in ("hydra.run.dir", "hydra.sweep.dir", "run_dir"):
        if not typed.get(key, key):
            raise UserError(f"{key}= is empty: give a folder, or leave it out")
    for group in ("sweep", "launcher"):
        # The command of one job of a sweep names its folder, and that of a further rank is not the user's.
        if not is_sweep and typed.get(group, "null") != "null" and "hydra.run.dir" not in typed and not rank():
            raise UserError(f"{group}={typed[group]} without -m would train one run: add -m")
    given = typed.get("resume", "null")
    is_resumed = given.lower() != "null"
    for path in {os.path.abspath(typed.get("run_dir", "")), os.path.abspath(given if is_resumed else "")}:
        if "${" in path:
            raise UserError(f"{path}: Hydra would read the ${{ in this path as its own: rename the folder")
    if not is_resumed:
        is_own = "run_dir" in typed and "hydra.run.dir" not in typed and not is_sweep
        return [f"hydra.run.dir={quoted(typed['run_dir'])}"] if is_own else []
    if is_sweep:
        raise UserError(f"resume={given} in a sweep (-m): go on with one run at a time, without -m")
    folder, _ = find_run(given)
    opened = [item for item in _OPENED if item.partition("=")[0] not in typed]
    return [*opened, f"hydra.run.dir={quoted(str(folder))}", f"hydra.output_subdir={RESUME_RECORD}"]


def main() -> None:
    """Run the command with the arguments in `sys.argv`."""
    from bitnet_lit.runs.job import ResumableTask

    run_command("train", _train, defaults=_place, configure=_configure, resumable=ResumableTask(_resume, _preview))


if __name__ == "__main__":
    main()
