"""A run's folder is its own from the first moment, before Hydra writes into it.

The default names hold the second at which a run began, and two runs may begin in one: the first takes the folder, the
second another (`12-00-00-1`). Into a folder that is another run's nothing is recorded (`record_name`): the run is
refused later (`folder.claim`), or it is a resume.

Where torchrun or srun started every rank, only the first one takes a folder. The others write nothing; Hydra makes a
folder for them all the same, among temporary files, which goes when they end.
"""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from bitnet_lit.overrides import quoted
from bitnet_lit.runs.folder import RECORD, is_taken
from bitnet_lit.runs.ranks import rank


def record_name(folder: str | None) -> str | None:
    """The folder in a run's folder for Hydra's record; None where another run lies there, and on other ranks.

    Args:
        folder: the run's; None where Hydra only prints its config (`--cfg all`).
    """
    return None if rank() or (folder is not None and is_taken(Path(folder))) else RECORD


def run_dir(folder: str | None, configured: str) -> str:
    """The run folder; where Hydra only prints its config, what it would be called."""
    return folder or configured


OmegaConf.register_new_resolver("bitnet.record_name", record_name, replace=True)
OmegaConf.register_new_resolver("bitnet.run_dir", run_dir, replace=True)


def make_own(folder: Path) -> Path:
    """Make a folder that nobody made before: `folder` itself, or the first of `folder-1`, `folder-2`, ..."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        own = folder.with_name(f"{folder.name}-{number}") if number else folder
        try:
            own.mkdir()
        except FileExistsError:
            continue
        return own
    raise AssertionError  # count() has no end


def _make_temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"bitnet-lit-rank-{rank()}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class OwnFolder(Callback):
    """Takes the folder of a run or of a sweep whose name was not typed."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _take(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _take(config, "hydra.sweep.dir")


def _take(config: DictConfig, key: str) -> None:
    typed: Any = OmegaConf.to_container(config.hydra.overrides.hydra)
    if any(override.lstrip("+").startswith(f"{key}=") for override in typed):
        return
    folder = Path(OmegaConf.select(config, key))
    try:
        own = _make_temporary() if rank() else make_own(folder)
    except OSError:
        return  # Hydra makes folders too, and its error ends the command
    if own != folder:
        override = f"{key}={quoted(str(own))}"
        OmegaConf.update(config, key, str(own))
        config.hydra.overrides.hydra.append(override)  # the jobs of a sweep are composed anew
