"""A distributed run has several processes, called ranks. This module says which one this is.

torchrun and srun start every rank with the user's command. Otherwise Lightning starts the other ranks from rank 0: it
repeats the command of rank 0 (`sys.argv` and the module that runs as `__main__`) and appends the run folder. A job of a
sweep has no command of its own, so `command_of_a_job` makes one for Lightning.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence

# Environment variables in which launchers give the rank, in the order in which Lightning reads them.
_NAMES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
# Hydra's settings that belong to a sweep, or that Lightning sets for the new rank.
_NOT_OF_A_JOB = ("hydra.mode", "hydra.run.", "hydra.sweep", "hydra.launcher", "hydra/sweeper", "hydra/launcher")


def rank() -> int:
    """Return the rank of this process. Rank 0 owns the run folder."""
    return next((int(os.environ[name]) for name in _NAMES if name in os.environ), 0)


@contextlib.contextmanager
def command_of_a_job(module: str, flags: Sequence[str]) -> Iterator[None]:
    """Wrap a job of a sweep: set the command with which Lightning starts the job's other ranks.

    Args:
        module: the module of the command, as `python -m` takes it.
        flags: the flags of Hydra that the user typed.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import read_write

    import __main__

    hydra = HydraConfig.instance().cfg.hydra  # type: ignore[union-attr]
    with read_write(hydra):
        hydra.run.dir = hydra.runtime.output_dir  # what Lightning appends
    before = sys.argv, __main__.__spec__
    sys.argv = [
        sys.argv[0],
        *[flag for flag in flags if flag not in ("-m", "--multirun")],
        *hydra.overrides.task,
        *[override for override in hydra.overrides.hydra if not override.lstrip("+~").startswith(_NOT_OF_A_JOB)],
        "hydra.mode=RUN",
    ]
    __main__.__spec__ = importlib.util.find_spec(module)  # in joblib's processes it is a module of joblib
    try:
        yield
    finally:
        sys.argv, __main__.__spec__ = before
