"""Ranks, the processes of one distributed run: which one this is, and how Lightning starts the others of it.

torchrun and srun start every rank with the user's command. Otherwise Lightning starts them from the first one, with the
first one's command (`sys.argv` and the module that runs as `__main__`), and appends the run folder. A job of a sweep
has no command of its own: it gets one here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence

# Where launchers say which process this is, in Lightning's order.
_NAMES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
# Hydra's settings that belong to a sweep, or that Lightning gives anew.
_NOT_OF_A_JOB = ("hydra.mode", "hydra.run.", "hydra.sweep", "hydra.launcher", "hydra/sweeper", "hydra/launcher")


def rank() -> int:
    """The number of this process among those of its run; number 0 owns the run folder."""
    return next((int(os.environ[name]) for name in _NAMES if name in os.environ), 0)


@contextlib.contextmanager
def command_of_a_job(module: str, flags: Sequence[str]) -> Iterator[None]:
    """Around a job of a sweep: let Lightning start its other ranks with what this job is.

    Args:
        module: the command's, as `python -m` takes it.
        flags: Hydra's flags that were typed.
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
    __main__.__spec__ = importlib.util.find_spec(module)  # joblib's processes run a module of joblib's
    try:
        yield
    finally:
        sys.argv, __main__.__spec__ = before
