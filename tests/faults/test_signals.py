"""A signal between any two steps of the code is said in one line, whatever exception it has become on its way."""

import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from bitnet_lit import entry_point
from tests.forked import ForkServer, call_command
from tests.support import TINY_RUN

SEED = int(os.environ.get("FAULTS_SEED", "0"))
POINTS = 500 if os.environ.get("FAULTS") == "all" else 2  # a point takes one to three seconds
ENDS = {signal.SIGINT: "error: interrupted\n", signal.SIGTERM: "error: ended by SIGTERM\n"}


def signalled(number: int, call: int, name: str, arguments: list[str]) -> None:
    """`python -m bitnet_lit.<name>` with a signal at the given call of a function, counted from when it hears signals.

    With `call` 0 there is no signal, and the last line of the output is the count of calls.
    """
    count = 0

    def count_calls(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        if event == "call" and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            count += 1
            if count == call:
                sys.setprofile(None)
                os.kill(os.getpid(), number)

    sys.setprofile(count_calls)
    try:
        call_command(name, arguments)
    finally:
        sys.setprofile(None)
        if not call:
            print(f"\n{count}")


def replaced(number: int) -> None:
    """Work whose KeyboardInterrupt meets a `finally` too early, as in omegaconf's DictConfig."""

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            old = "set later"
        finally:
            print(old)

    entry_point.leave(work)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as made:
        yield made


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
@pytest.mark.parametrize(("name", "wrong"), [("train", "data.dir=nowhere"), ("infer", "checkpoint=nowhere")])
def test_at_any_call(server, tmp_path, name, wrong, number):
    arguments = [wrong]  # so the command ends by itself once its config is composed
    whole = server.run(signalled, number, 0, name, arguments, cwd=tmp_path)
    assert whole.status == 2, whole
    calls = int(whole.output.split()[-1])
    for call in random.Random(f"{SEED} {name} {number}").sample(range(1, calls), POINTS):
        result = server.run(signalled, number, call, name, arguments, cwd=tmp_path)
        assert (result.status, result.output) == (128 + number, ENDS[number]), f"FAULTS_SEED={SEED}, call {call}"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_at_any_call_of_a_run(server, shards, tmp_path, number):
    """PyTorch, Lightning and Hydra catch some exceptions and log them, or leave others in their place."""
    arguments = [f"data.dir={shards}", *TINY_RUN, "trainer.max_steps=3", "run_dir=run"]
    whole = server.run(signalled, number, 0, "train", arguments, cwd=tmp_path)
    assert whole.status == 0, whole
    calls = int(whole.output.split()[-1])
    for call in random.Random(f"{SEED} run {number}").sample(range(1, calls), POINTS):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        result = server.run(signalled, number, call, "train", arguments, cwd=tmp_path)
        said = f"FAULTS_SEED={SEED}, call {call} of {calls}: {result}"
        assert result.status == 128 + number and "Traceback" not in result.output, said
        *others, last = result.output.splitlines()
        assert last.startswith((f"error: {number.name}", ENDS[number][:-1])) and "error:" not in "".join(others), said


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
def test_an_exception_in_the_place_of_the_interrupt(server, tmp_path, number):
    result = server.run(replaced, number, cwd=tmp_path)
    assert (result.status, result.output) == (128 + number, ENDS[number])
