"""Damaged files and garbage on the command line, from a seed: each is taken, or refused in one line.

About a minute of inputs; FUZZ_SECONDS gives more (`make fuzz`: an hour), FUZZ_SEED others. A quarter of the time again
goes to the native engine, compiled with the sanitizers of addresses and of undefined behaviour.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.fuzz.fuzzer import Fuzzer, sanitized, told
from tests.fuzz.targets import ENGINE_KINDS, KINDS

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(int(600 + 2 * SECONDS)),
    pytest.mark.skipif(sys.platform != "linux", reason="forks of a process with threads, and /proc"),
]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    made = Fuzzer(tmp_path_factory.mktemp("fuzz") / "fuzz")
    with made.server:
        yield made


def judge(fuzzer, kind, seconds):
    tried, wrong = fuzzer.fuzz(kind, SEED, seconds)
    print(f"{kind}: seed {SEED}, {tried} inputs, {len(wrong)} wrong")
    if wrong:
        pytest.fail(f"{len(wrong)} of {tried}:\n" + "\n".join(map(told, wrong)), pytrace=False)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_one_line_comes_out(fuzzer, kind):
    judge(fuzzer, kind, SECONDS / len(KINDS))


@pytest.fixture(scope="module")
def engine_fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    try:
        made = sanitized(tmp_path_factory.mktemp("sanitized"))
    except OSError as error:
        pytest.skip(f"the sanitizers of g++ are not here: {error}")
    with made.server:
        yield made


@pytest.mark.parametrize("kind", ENGINE_KINDS)
def test_the_engine_does_nothing_undefined(engine_fuzzer, kind):
    judge(engine_fuzzer, kind, SECONDS / 4 / len(ENGINE_KINDS))
