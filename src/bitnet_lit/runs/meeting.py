"""The first process of a run does some work while the others wait for it, before a process group connects them.

torchrun, srun and a user on several nodes start all processes at once. They meet in a store of key and value, which
torchrun keeps. Otherwise the first process keeps it, at the address where the process group will meet: stores of one
process at one port share their server. Processes that Lightning starts come when the first one has done the work.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from bitnet_lit.errors import UserError
from bitnet_lit.runs.ranks import in_slurm_job

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_CONNECTION = timedelta(minutes=30)  # for processes that start late; a process group waits as long
_WORK = timedelta(days=1)
_meetings = itertools.count()  # so far; all processes count the same ones
_kept: list[TCPStore] = []  # the others read the store until the process group is there
_DONE, _FAILED = b"done", b"failed"


def _store(is_first: bool) -> TCPStore | None:
    """Return the store in which the processes of a run meet; None where they need not meet.

    Raises:
        UserError: the port is taken, or the first process cannot be reached.
    """
    given = os.environ
    by_torchrun = given.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    by_hand = "MASTER_ADDR" in given and "MASTER_PORT" in given and "NODE_RANK" in given and "LOCAL_RANK" not in given
    if by_torchrun or by_hand:
        address, port = given["MASTER_ADDR"], int(given["MASTER_PORT"])
    elif in_slurm_job() and int(given["SLURM_NTASKS"]) > 1:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        environment = SLURMEnvironment(auto_requeue=False)
        address, port = environment.main_address, environment.main_port
    else:
        return None
    from torch.distributed import DistError, TCPStore

    keeps = is_first and not by_torchrun
    try:
        return TCPStore(address, port, is_master=keeps, timeout=_CONNECTION, wait_for_workers=False, multi_tenant=True)
    except DistError:
        what = "is taken: give a free port" if keeps else "does not answer: give the address and a free port of rank 0"
        raise UserError(f"MASTER_ADDR={address} MASTER_PORT={port}: {what}") from None


def first_alone(work: Callable[[], object], is_first: bool, what: str) -> None:
    """Do `work` in the first process of a run, and return in each process when it is done.

    Args:
        is_first: whether this is the first process.
        what: the name of the work, for the error text.

    Raises:
        UserError: the work has failed in the first process, and this is another one; or they cannot meet.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart of the processes
    store, key = _store(is_first), f"bitnet_lit/meeting/{restarts}/{next(_meetings)}"
    if is_first:
        result = _FAILED
        try:
            work()
            result = _DONE
        finally:
            if store is not None:
                store.set(key, result)  # type: ignore[arg-type]  # it takes bytes too
                _kept.append(store)
    elif store is not None:
        try:
            store.wait([key], _WORK)
            result = store.get(key)
        except RuntimeError:  # the first process has ended, and its store with it
            result = _FAILED
        if result != _DONE:
            raise UserError(f"{what} has failed in the first process of the run, which says why")
