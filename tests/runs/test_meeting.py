"""The first process works while the others wait, whoever has started them."""

import itertools
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from bitnet_lit.errors import UserError
from bitnet_lit.runs import meeting
from bitnet_lit.runs.meeting import all_or_none, first_alone

SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "3",
    "SLURM_NTASKS_PER_NODE": "3",
    "SLURM_NODELIST": "localhost",
}


@pytest.fixture(params=["torchrun", "srun", "by hand"])
def launched(request, monkeypatch):
    """What the launcher sets for all processes, which are threads here."""
    for name in {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK"} & os.environ.keys():
        monkeypatch.delenv(name)
    if request.param == "torchrun":  # it keeps a store
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        given = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
        given["WORLD_SIZE"] = "3"
    else:
        store = None
        with socket.socket() as free:
            free.bind(("localhost", 0))
            given = {"MASTER_PORT": str(free.getsockname()[1])}
        given |= SLURM if request.param == "srun" else {"MASTER_ADDR": "localhost", "NODE_RANK": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "_meetings", itertools.repeat(0))  # each process counts by itself
    monkeypatch.setattr(meeting, "_kept", [])
    yield store
    monkeypatch.delenv("MASTER_ADDR", raising=False)  # Lightning sets it under srun


def test_the_others_wait_until_the_first_one_has_done_the_work(launched):
    events = []

    def work():
        time.sleep(0.3)
        events.append("done")

    def other():
        first_alone(work, False, "the work")
        events.append("after it")

    with ThreadPoolExecutor() as pool:
        others = [pool.submit(other) for _ in range(2)]
        first_alone(work, True, "the work")
        for each in others:
            each.result(timeout=60)
    assert events == ["done", "after it", "after it"]


def test_the_others_end_where_the_first_one_fails(launched):
    def work():
        raise OSError("no data")

    with ThreadPoolExecutor() as pool:
        other = pool.submit(first_alone, work, False, "the work")
        with pytest.raises(OSError, match="no data"):
            first_alone(work, True, "the work")
        with pytest.raises(UserError, match="the work has failed in the first process of the run"):
            other.result(timeout=60)


def ended(failing):
    """How three processes end of which some fail, each as its result or error."""

    def process(number):
        with all_or_none(number, 3, "the start"):
            time.sleep(0.1 * number)
            if number in failing:
                raise OSError(f"of {number}")
        return "goes on"

    with ThreadPoolExecutor() as pool:
        processes = [pool.submit(process, number) for number in range(3)]
        return [each.exception(timeout=60) or each.result() for each in processes]


@pytest.mark.parametrize("failing", [(), (0,), (2,), (0, 1, 2)])
def test_no_process_goes_on_where_one_has_failed(launched, failing):
    """Only the first process locks the folder, for example, and only one of a machine reads the teacher."""
    results = ended(failing)
    for number, result in enumerate(results):
        if number in failing:
            assert isinstance(result, OSError) and str(result) == f"of {number}"
        elif failing:
            said = rf"the start has failed in process {failing[0]} of the run, which says why"
            assert isinstance(result, UserError) and re.fullmatch(said, str(result))
        else:
            assert result == "goes on"


def test_a_process_that_never_comes_is_named(launched, monkeypatch):
    monkeypatch.setattr(meeting, "_CONNECTION", timedelta(seconds=1))
    said = "^the start: process 1 of the run has not come within 0:00:01: start all of them$"
    with pytest.raises(UserError, match=said), all_or_none(0, 3, "the start"):
        pass


def test_a_restart_of_torchrun_does_not_read_the_failure_before_it(monkeypatch, launched):
    if launched is None:
        pytest.skip("a store ends with its first process")
    with pytest.raises(ZeroDivisionError):
        first_alone(lambda: 1 / 0, True, "the work")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with ThreadPoolExecutor() as pool:
        other = pool.submit(first_alone, lambda: None, False, "the work")
        first_alone(lambda: time.sleep(0.3), True, "the work")
        other.result(timeout=60)


def test_a_process_group_connects_where_they_met(monkeypatch, launched):
    if launched is not None:
        pytest.skip("torchrun's own store")
    first_alone(lambda: None, True, "the work")
    port = int(os.environ["MASTER_PORT"])
    again = TCPStore("localhost", port, world_size=1, is_master=True, multi_tenant=True)  # as init_process_group does
    again.set("key", "value")
    assert again.get("key") == b"value"


def test_processes_that_cannot_meet_are_one_line(monkeypatch):
    monkeypatch.setattr(meeting, "_CONNECTION", timedelta(seconds=1))
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=rf"^MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: is taken: give a free port$"):
            first_alone(lambda: None, True, "the work")
    with pytest.raises(UserError, match="does not answer: give the address and a free port of rank 0"):
        first_alone(lambda: None, False, "the work")


def test_processes_that_come_later_need_not_wait(monkeypatch):
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "NODE_RANK": "0", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)  # as Lightning sets it for the ranks that it starts
    first_alone(lambda: pytest.fail("this is not the first one"), False, "the work")
    with all_or_none(1, 2, "the start"):
        pass
