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

# Hydra's settings that belong to a sweep, or that Lightning sets for the new rank.
_NOT_OF_A_JOB = ("hydra.mode", "hydra.run.", "hydra.sweep", "hydra.launcher", "hydra/sweeper", "hydra/launcher")


def rank() -> int:
    """Return the rank of this process, or a number above 0 for a process whose rank only Lightning will know.

    Rank 0 owns the run folder. torchrun sets RANK. Lightning sets LOCAL_RANK for the processes that it starts, and a
    user who starts one process on each node sets NODE_RANK (and MASTER_ADDR). SLURM and LSF have names of their own.
    """
    given = os.environ
    if "RANK" in given:
        return int(given["RANK"])
    node = int(given.get("NODE_RANK", "0")) if "MASTER_ADDR" in given else 0
    if node or "LOCAL_RANK" in given:
        return node + int(given.get("LOCAL_RANK", "0"))
    return int(given.get("SLURM_PROCID", given.get("JSM_NAMESPACE_RANK", "0")))


def is_first_of_node() -> bool:
    """Return whether this process is the first rank of its machine, and does there what one can do for all."""
    given = os.environ
    return int(given.get("LOCAL_RANK", given.get("SLURM_LOCALID", "0"))) == 0


def in_slurm_job() -> bool:
    """Return whether SLURM has started this process. As for Lightning, a shell that SLURM has started does not count.

    salloc names its job interactive. A user gives a job the name bash or interactive to start ranks in another way.
    """
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


@contextlib.contextmanager
def command_of_a_job(module: str, flags: Sequence[str], resumed: Sequence[str] | None = None) -> Iterator[None]:
    """Wrap a job of a sweep: set the command with which Lightning starts the job's other ranks.

    Args:
        module: the module of the command, as `python -m` takes it.
        flags: the flags of Hydra that the user typed, without that of a sweep.
        resumed: the overrides that go on with the job; None: those that begin it.
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
        *flags,
        *(hydra.overrides.task if resumed is None else resumed),
        *[override for override in hydra.overrides.hydra if not override.lstrip("+~").startswith(_NOT_OF_A_JOB)],
        "hydra.mode=RUN",
    ]
    __main__.__spec__ = importlib.util.find_spec(module)  # in joblib's processes it is a module of joblib
    try:
        yield
    finally:
        sys.argv, __main__.__spec__ = before
