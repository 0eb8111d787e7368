"""A command that is killed, or that the disk fails, at any of its file operations: nothing is lost or left over.

The operations of an unbroken command are counted through a preloaded layer (`fault_layer.c`). Then the command is
broken at one of them, the user does what he would do (`resume=`, or the same command again), and the folder must hold
what the unbroken command left.

pytest tries a sample of the points; `make faults` tries all of them. FAULTS_SEED chooses another sample.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fault_layer import Fault, Faults, Operation, broken, full, kill, missing, read_only, tear
from tests.faults.scenarios import NOTES, SCENARIOS, Scenario, differences, fill, finish, holds, not_flushed
from tests.forked import Result, call_command

ALL = os.environ.get("FAULTS") == "all"
SEED = int(os.environ.get("FAULTS_SEED", "0"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(0 if ALL else 1200)]
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    made = Faults(tmp_path_factory.mktemp("fault_layer"))
    with made.server:
        yield made


class Broken:
    """A scenario: its folder before the command, what an unbroken one leaves, and how it gets there."""

    def __init__(self, scenario: Scenario, faults: Faults, shards: Path, root: Path) -> None:
        self.scenario, self.faults = scenario, faults
        self.before, self.folder = root / "before", root / "work"
        fill(self.before, scenario, shards, faults)
        result, self.operations = self._start(Fault())
        assert result.status == 0, result
        self.expected = holds(self.folder)
        assert self.operations, "the command wrote nothing"

    def _start(self, fault: Fault) -> tuple[Result, list[Operation]]:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.before, self.folder)
        return self.faults.run(
            fault, self.folder, call_command, self.scenario.command, self.scenario.arguments, cwd=self.folder
        )

    def points(self, count: int, salt: str) -> list[int]:
        """Numbers of operations: a sample that the seed draws, or all of them.

        Of the writes to one file in a row, the first and the last count: a checkpoint has a hundred, and those between
        leave the same folder but for the size of a temporary file.
        """
        numbers = [
            here.number
            for before, here, after in zip(
                [None, *self.operations], self.operations, [*self.operations[1:], None], strict=False
            )
            if not (before and after and before.same(here) and here.same(after))
        ]
        if ALL:
            return numbers
        return sorted(random.Random(f"{SEED} {self.scenario.name} {salt}").sample(numbers, min(count, len(numbers))))

    def _finished(self, results: list[Result]) -> list[str]:
        """What is wrong after the user has gone on."""
        last = results[-1]
        complete = self.scenario.resumes and last.status == 2 and "complete" in last.output
        if (last.status != 0 and not complete) or "Traceback" in last.output:
            return [f"{last}"]
        return differences(holds(self.folder), self.expected)

    def after_kills(self, *kills: Fault) -> list[str]:
        """What is wrong when the command, and each that goes on with it, is killed so, and one more goes on."""
        first, *others = kills
        result, _ = self._start(first)
        if not result.killed:
            return [f"not killed: {result}"]
        for fault in others:
            finish(self.faults, self.scenario, self.folder, fault)
        return self._finished(finish(self.faults, self.scenario, self.folder))

    def after_error(self, fault: Fault) -> list[str]:
        """What is wrong with how the command meets a failing disk: more than one line, or not finished later."""
        result, _ = self._start(fault)
        errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
        if result.status in (1, 2) and len(errors) == 1 and "Traceback" not in result.output:
            return self._finished(finish(self.faults, self.scenario, self.folder))
        if result.status == 0 and "Traceback" not in result.output:
            return differences(holds(self.folder), self.expected)  # it was no loss
        return [f"{result}"]


@pytest.fixture(scope="module")
def broken_up(faults: Faults, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Broken]:
    """The scenario of a name; what an unbroken command leaves is found out once for all tests."""
    return functools.cache(lambda name: Broken(BY_NAME[name], faults, shards, tmp_path_factory.mktemp(name)))


def judge(scene: Broken, tried: list[tuple[Any, list[str]]]) -> None:
    """Show every point with something wrong."""
    names = {operation.number: str(operation) for operation in scene.operations}
    wrong = [
        f"{fault} ({names.get(getattr(fault, 'first', 0), '')}):\n  " + "\n  ".join(lines)
        for fault, lines in tried
        if lines
    ]
    print(f"{scene.scenario.name}: seed {SEED}, {len(tried)} points of {len(scene.operations)} operations")
    assert tried, "no point was tried"
    if wrong:
        pytest.fail(f"FAULTS_SEED={SEED}: {len(wrong)} of {len(tried)}:\n" + "\n".join(wrong), pytrace=False)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_killed_command_is_finished_by_the_next(broken_up, name):
    scene = broken_up(name)
    points = [kill(number) for number in scene.points(scene.scenario.sampled, "kill")]
    writes = {operation.number for operation in scene.operations if operation.name == "write"}
    points += [tear(number) for number in scene.points(scene.scenario.sampled, "tear") if number in writes]
    judge(scene, [(point, scene.after_kills(point)) for point in points])


@pytest.mark.parametrize("name", [s.name for s in SCENARIOS if s.resumes or s.older or s.command == "prepare"])
def test_killed_twice(broken_up, name):
    scene = broken_up(name)
    draw = random.Random(f"{SEED} {name} twice")
    numbers = scene.points(max(2, scene.scenario.sampled // 4), "twice")
    pairs = [(kill(number), kill(draw.randint(1, len(scene.operations)))) for number in numbers]
    judge(scene, [(pair[0], [f"then {pair[1]}: {line}" for line in scene.after_kills(*pair)]) for pair in pairs])


@pytest.mark.parametrize("kind", [full, broken, read_only, "quota"], ids=["full", "broken", "read_only", "quota"])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_disk_that_fails_is_said_in_a_line(broken_up, name, kind):
    scene = broken_up(name)
    make = (lambda number: full(number, errno.EDQUOT)) if kind == "quota" else kind
    numbers = scene.points(max(1, scene.scenario.sampled // 4), str(kind))
    judge(scene, [(make(number), scene.after_error(make(number))) for number in numbers])


@pytest.mark.parametrize(
    ("operation", "error"),
    [("link", errno.EPERM), ("exchange", errno.EINVAL), ("fsyncdir", errno.EINVAL), ("flock", errno.ENOLCK)],
)
@pytest.mark.parametrize("name", ["train", "prepare", "packed-again", "gguf-again"])
def test_a_file_system_that_knows_less(broken_up, name, operation, error):
    """exFAT has no links, network mounts no locks or no flush of folders, older systems no exchange of two names."""
    scene = broken_up(name)
    fault = missing(operation, error)
    judge(scene, [(fault, scene.after_error(fault))])


@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_renamed_was_flushed(broken_up, name):
    assert not_flushed(broken_up(name).operations) == []


@pytest.mark.parametrize("name", [s.name for s in SCENARIOS if s.older])
def test_what_the_user_put_there_stays(broken_up, name):
    scene = broken_up(name)
    if (scene.before / scene.scenario.target).is_dir():
        assert scene.expected.get(f"{scene.scenario.target}/NOTES.txt") == NOTES.encode()
    else:
        assert scene.expected[scene.scenario.target] != holds(scene.before)[scene.scenario.target]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1], ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["train", "prepare"])
def test_a_signal_at_any_moment(broken_up, faults, name, number):
    scene = broken_up(name)
    draw = random.Random(f"{SEED} {name} {number}")
    tried = []
    for _ in range(20 if ALL else 2):
        moment = draw.uniform(0, 1.5 if name == "train" else 0.3)
        shutil.rmtree(scene.folder, ignore_errors=True)
        shutil.copytree(scene.before, scene.folder)
        result = faults.server.run(
            call_command, name, scene.scenario.arguments, cwd=scene.folder, signals=[(moment, number)], seconds=60
        )
        lines = [f"after {moment:.3f} s: {result}"] if "Traceback" in result.output else []
        if result.status not in (0, 128 + number, -number):
            lines.append(f"after {moment:.3f} s: {result}")
        lines += scene._finished(finish(faults, scene.scenario, scene.folder))
        tried.append((f"{number.name} after {moment:.3f} s", lines))
    judge(scene, tried)
