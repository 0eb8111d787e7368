"""The run folder's config.yaml: written at the start, read by `resume`.

A run is resumed with the config it began with, not with today's defaults; overrides on the command line go on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitnet_lit.atomic import atomic_file
from bitnet_lit.config import AdamWConfig, MuonConfig, TrainConfig
from bitnet_lit.errors import UserError
from bitnet_lit.training.callbacks.checkpoints import LAST

CONFIG_NAME = "config.yaml"
OPTIMIZERS = {"adamw": AdamWConfig, "muon": MuonConfig}


def save_config(config: TrainConfig, run_dir: Path) -> None:
    """Write the whole config, every default filled in."""
    with atomic_file(run_dir / CONFIG_NAME) as temporary:
        OmegaConf.save(OmegaConf.structured(config), temporary)


def resume_config(run_dir: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config to resume `run_dir` with.

    Args:
        overrides: `key=value` to change; keys of values only, a group (optim=muon) would be another run.

    Raises:
        UserError: no run folder, nothing to resume from, or an override that cannot be.
    """
    folder = Path(run_dir)
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"resume={run_dir}: no run folder ({CONFIG_NAME} is missing): give the folder train wrote")
    if not (folder / "checkpoints" / LAST).is_file():
        raise UserError(
            f"resume={run_dir}: no checkpoint in it (it was stopped before its first one): start again without resume"
        )
    try:
        saved: Any = OmegaConf.load(path)
        schema = TrainConfig(optim=OPTIMIZERS[saved.optim.name]())
        cfg = OmegaConf.merge(OmegaConf.structured(schema), saved)
        for override in overrides:
            key, _, value = override.lstrip("+").partition("=")
            if OmegaConf.select(cfg, key, default=None) is not None and OmegaConf.is_config(OmegaConf.select(cfg, key)):
                raise UserError(
                    f"resume={run_dir} with {override}: a resumed run keeps its {key}; override single values "
                    f"({key}.<name>=...), or start another run with init_from={run_dir}"
                )
            OmegaConf.update(cfg, key, OmegaConf.create(f"value: {value}").value)
        config: Any = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"resume={run_dir}: {' '.join(str(error).split())}") from None
    was, now = ((c.trainer.max_steps, c.trainer.max_tokens) for c in (saved, config))
    if was != now and config.schedule.total_steps is None:
        raise UserError(
            f"resume={run_dir} with another length than trainer.max_steps={saved.trainer.max_steps}: it would move the "
            f"learning rate's curve: add schedule.total_steps={saved.trainer.max_steps} to keep the curve, or the new "
            "length to stretch it"
        )
    return replace(config, resume=run_dir, run_dir=run_dir)


def checkpoint_step(run_dir: Path) -> int:
    """Optimizer steps that the run's last checkpoint has behind it.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    path = run_dir / "checkpoints" / LAST
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception as error:  # torch raises a different type for each way a file can be broken
        raise UserError(f"{path}: cannot be read ({type(error).__name__}): resume from a copy of it") from None
