"""Every run gets a folder of its own before Hydra writes into it.

The default name of a run's folder is the second at which it began, and two runs may begin in the same second. Then the
first run takes that folder, and the second takes another (`12-00-00-1`). The default name of a sweep's folder comes
from its overrides, so that the same sweep goes on in it. If a folder that was typed belongs to another run, Hydra's
record is not written into it (`record_name`), and the run is refused later (`folder.check_free`) unless it is a resume.

Where torchrun or srun started every rank, only rank 0 takes a folder. The others write nothing, but Hydra needs a
folder for each process. They get a temporary one, which is removed when they end.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import shutil
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from bitnet_lit.overrides import quoted
from bitnet_lit.runs.folder import RECORD, is_taken
from bitnet_lit.runs.job_names import sweep_name
from bitnet_lit.runs.ranks import rank

_OWN_SWEEPERS = "hydra_plugins.bitnet_lit_sweepers"
BASIC, GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", f"{_OWN_SWEEPERS}.GridSweeper"


def record_name(folder: str | None) -> str | None:
    """Return the name of Hydra's record in the run folder, or None where it must not be written.

    It must not be written into another run's folder, and only rank 0 writes it.

    Args:
        folder: the run folder; None where Hydra only prints its config (`--cfg all`).
    """
    try:
        return None if rank() or (folder is not None and is_taken(Path(folder))) else RECORD
    except PermissionError:  # a folder of another user's; the run is refused when it writes
        return None


def run_dir(folder: str | None, configured: str) -> str:
    """Return the run folder.

    Args:
        folder: the folder that Hydra made; None where it only prints its config (`--cfg all`).
        configured: the folder in the config, which is returned where Hydra made none.
    """
    return folder or configured


def sweep_dir(overrides: list[str], sweeper: DictConfig) -> str:
    """Return the default folder of a sweep.

    With this package's sweepers it is the same whenever the sweep is started again (`job_names.py`). Other sweepers
    cannot go on with a sweep, so theirs is the second at which the sweep began.

    Args:
        overrides: of the whole sweep.
        sweeper: the config of Hydra's sweeper.
    """
    if _is_own(sweeper):
        may_grow = sweeper._target_ in (BASIC, GRID)
        return f"outputs/sweeps/{sweep_name(overrides, sweeper.params or {}, may_grow)}"
    return f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S}"


def _is_own(sweeper: DictConfig) -> bool:
    return sweeper._target_ == BASIC or str(sweeper._target_).startswith(f"{_OWN_SWEEPERS}.")


OmegaConf.register_new_resolver("bitnet.sweep_dir", sweep_dir, replace=True)
OmegaConf.register_new_resolver("bitnet.record_name", record_name, replace=True)
OmegaConf.register_new_resolver("bitnet.run_dir", run_dir, replace=True)


def make_own(folder: Path) -> Path:
    """Make a new folder and return it: `folder`, or the first of `folder-1`, `folder-2`, ... that does not exist."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        own = folder.with_name(f"{folder.name}-{number}") if number else folder
        try:
            own.mkdir()
        except FileExistsError:
            continue
        return own
    raise AssertionError  # unreachable: count() has no end


def _make_temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"bitnet-lit-rank-{rank()}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class OwnFolder(Callback):
    """Makes the folder of a run or of a sweep, unless the user has given one."""

    def __init__(self) -> None:
        self._own: Path | None = None  # the folder that was made for a run

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        typed: Any = OmegaConf.to_container(config.hydra.overrides.hydra)
        if any(override.lstrip("+").startswith("hydra.run.dir=") for override in typed):
            return
        folder = Path(config.hydra.run.dir)
        try:
            own = self._own = _make_temporary() if rank() else make_own(folder)
        except OSError:
            return  # Hydra makes folders too, and its error ends the command
        if own != folder:
            OmegaConf.update(config, "hydra.run.dir", str(own))
            config.hydra.overrides.hydra.append(f"hydra.run.dir={quoted(str(own))}")

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Remove the folder of a run that was refused, if it holds nothing but Hydra's record."""
        if self._own is None or not isinstance(kwargs["job_return"].return_value, Exception):
            return
        with contextlib.suppress(OSError):
            if [path.name for path in self._own.iterdir()] == [RECORD]:
                shutil.rmtree(self._own)
                self._own.parent.rmdir()  # the folder of the day, unless it holds other runs

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose the sweeper, and fix the folder of the sweep.

        Each job composes its config again, and has other overrides than the sweep. A file in conf/sweep/ may choose a
        sweeper of its own, but only if the main config does not. So Hydra's default is replaced here.
        """
        if config.hydra.sweeper._target_ == BASIC:
            config.hydra.sweeper._target_ = GRID
        raw: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
        folder = Path(config.hydra.sweep.dir)
        if raw["dir"].startswith("${bitnet.sweep_dir") and not _is_own(config.hydra.sweeper):
            folder = _make_temporary() if rank() else make_own(folder)
        OmegaConf.update(config, "hydra.sweep.dir", str(folder))
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(str(folder))}")
