"""The processes of a run meet before a process group connects them.

The first process does some work while the others wait for it (`first_alone`). And where one of them cannot begin the
run, the others must not wait for it in vain (`all_or_none`): only the first one locks the run folder, for example.

torchrun, srun and a user on several nodes start all processes at once. They meet in a store of key and value, which
torchrun keeps. Otherwise the first process keeps it, at the address where the process group will meet: stores of one
process at one port share their server. Processes that Lightning starts come when the first one has done the work.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from bitnet_lit.errors import UserError
from bitnet_lit.runs.ranks import in_slurm_job

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_CONNECTION = timedelta(minutes=30)  # for processes that start late; a process group waits as long
_WORK = timedelta(days=1)
_FAREWELL = timedelta(minutes=1)  # the first process has failed, and the others may be importing their packages yet
_POLL_SECONDS = 0.05
_meetings = itertools.count()  # so far; all processes count the same ones
_kept: list[TCPStore] = []  # the others read the store until the process group is there
_DONE, _FAILED = b"done", b"failed"


def _by_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _by_hand() -> bool:
    """Return whether a user has started this process, and one on each other machine."""
    return {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= os.environ.keys() and "LOCAL_RANK" not in os.environ


def _slurm_tasks() -> int:
    return int(os.environ["SLURM_NTASKS"])


def _store(is_first: bool) -> TCPStore | None:
    """Return the store in which the processes of a run meet; None where they need not meet.

    Raises:
        UserError: the port is taken, or the first process cannot be reached.
    """
    given = os.environ
    if _by_torchrun() or _by_hand():
        address, port = given["MASTER_ADDR"], int(given["MASTER_PORT"])
    elif in_slurm_job() and _slurm_tasks() > 1:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        environment = SLURMEnvironment(auto_requeue=False)
        address, port = environment.main_address, environment.main_port
    else:
        return None
    from torch.distributed import DistError, TCPStore

    keeps = is_first and not _by_torchrun()
    try:
        return TCPStore(address, port, is_master=keeps, timeout=_CONNECTION, wait_for_workers=False, multi_tenant=True)
    except DistError:
        what = "is taken: give a free port" if keeps else "does not answer: give the address and a free port of rank 0"
        raise UserError(f"MASTER_ADDR={address} MASTER_PORT={port}: {what}") from None


@contextlib.contextmanager
def all_or_none(number: int, num_nodes: int, what: str) -> Iterator[None]:
    """Run a block in every process of a run. At its end they wait for each other, and all fail where one has failed.

    Args:
        number: of this process, from 0 on (`ranks.rank`).
        num_nodes: machines of the run. A user who starts processes by hand starts one on each.
        what: the name of the block, for the error text.

    Raises:
        UserError: the block has failed in another process, or the others cannot be met.
    """
    restarts, store = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), _store(number == 0)
    key = f"bitnet_lit/all_or_none/{restarts}/{next(_meetings)}"
    if store is None:
        yield
        return
    _kept.append(store)
    count = int(os.environ["WORLD_SIZE"]) if _by_torchrun() else num_nodes if _by_hand() else _slurm_tasks()
    others = [other for other in range(count) if other != number]
    try:
        yield
    except BaseException:
        store.set(f"{key}/{number}", _FAILED)  # type: ignore[arg-type]  # it takes bytes too
        if number == 0:  # the store may end with this process
            with contextlib.suppress(UserError):
                _wait_for(others, store, key, _FAREWELL, what)
        raise
    store.set(f"{key}/{number}", _DONE)  # type: ignore[arg-type]
    _wait_for(others, store, key, _CONNECTION, what)


def _wait_for(others: list[int], store: TCPStore, key: str, limit: timedelta, what: str) -> None:
    """Wait until other processes have told how their block ended.

    Raises:
        UserError: it has failed in one of them, or one has not told it after `limit`.
    """
    end = time.monotonic() + limit.total_seconds()
    for other in others:
        try:
            while not store.check([f"{key}/{other}"]):  # a signal interrupts this loop, and not store.wait
                if time.monotonic() > end:
                    raise UserError(
                        f"{what}: process {other} of the run has not come within {limit}: start all of them"
                    )
                time.sleep(_POLL_SECONDS)
            failed = None if store.get(f"{key}/{other}") == _DONE else other
        except RuntimeError:  # the first process has ended, and its store with it
            failed = 0
        if failed is not None:
            raise UserError(f"{what} has failed in process {failed} of the run, which says why")


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
