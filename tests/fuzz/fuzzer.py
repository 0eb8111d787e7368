"""The fuzzer's loop: inputs by name, in batches; who died is known, and what failed fails once more, alone.

A batch of inputs shares a process, because a fork costs as much as a damaged input. An input that kills the process is
the first of the batch without a result. One that fails is tried again in a process of its own: only that counts, since
users run one command in a process.

One input again, with its folder kept to look at:  python -m tests.fuzz.fuzzer <seed> <kind> <number>

Inputs of the kinds "engine-..." run the native engine compiled with the sanitizers of addresses and of undefined
behaviour: what C++ leaves undefined may work today and write elsewhere tomorrow.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.forked import ForkServer, call_command
from tests.fuzz.originals import make_originals
from tests.fuzz.targets import MEMORY, SECONDS, TOO_LATE, batch

BATCH = 16


class Fuzzer:
    """Originals, a fork server, and a place to work.

    Args:
        root: a folder for all of it.
        memory: bytes an input may take; None for sanitizers, which map terabytes.
    """

    def __init__(
        self,
        root: Path,
        memory: int | None = MEMORY,
        preload: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.root, self.memory = root, memory
        self.server = ForkServer(preload, environment)
        (root / "originals").mkdir(parents=True)
        make_originals(root / "originals", self.server)
        tell = ["checkpoint=originals/latent", "max_new_tokens=1"]
        # Compiles the engine where it is not yet.
        warm = self.server.run(call_command, "infer", tell, cwd=root, seconds=400)
        assert warm.status == 0, warm

    def _run(self, names: list[str], folder: Path, until: float = float("inf")) -> Iterator[dict[str, Any]]:
        """Results of the inputs, up to and with the first that ends the process, or until it is too late."""
        results = self.root / "results.jsonl"
        results.unlink(missing_ok=True)
        arguments = (names, str(self.root / "originals"), str(folder), str(results), until)
        ended = self.server.run(
            batch, *arguments, cwd=self.root, seconds=(SECONDS + 5) * len(names), memory=self.memory
        )
        found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        yield from found
        if len(found) < len(names) and ended.status != TOO_LATE:
            wrong = "hangs" if ended.status == -signal.SIGALRM else f"ends the process with {ended.status}"
            said = Path(f"{folder}.output").read_text(encoding="utf-8", errors="replace")[-5000:]
            yield {"input": names[len(found)], "done": "", "status": ended.status, "wrong": wrong, "output": said}

    def alone(self, name: str) -> dict[str, Any]:
        """The result of one input in a process of its own; its folder stays."""
        folder = self.root / "failures" / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        return next(self._run([name], folder / "input"))

    def fuzz(self, kind: str, seed: int, seconds: float) -> tuple[int, list[dict[str, Any]]]:
        """Try inputs of a kind until the time is over; how many were tried, and the results that are wrong."""
        until, number, wrong = time.time() + seconds, 0, []
        while time.time() < until or not number:
            names = [f"{seed} {kind} {n}" for n in range(number, number + BATCH)]
            for result in list(self._run(names, self.root / "work", until)):
                number += 1
                if result["wrong"] and (again := self.alone(result["input"]))["wrong"]:
                    wrong.append(again)
        return number, wrong


def _library(name: str) -> Path:
    """A library of g++, by its file name."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip())


def sanitized(root: Path) -> Fuzzer:
    """A fuzzer whose engine reports what C++ leaves undefined, and ends the process.

    $CXX is what compiles the engine: here a script that adds the sanitizers. Python itself is not compiled with them,
    so their library comes before all others; leaks are Python's, and memory that shadows memory cannot be limited.

    Raises:
        OSError: no g++, or it comes without sanitizers.
    """
    preload = [_library("libasan.so"), _library("libstdc++.so.6")]
    for library in preload:
        library.stat()
    root.mkdir(parents=True, exist_ok=True)
    compiler, cache = root / "c++", root / "cache"
    compiler.write_text(
        "#!/bin/sh\nunset LD_PRELOAD\n"
        'exec g++ "$@" -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all\n'
    )
    compiler.chmod(0o755)
    cache.mkdir(mode=0o700)
    variables = {"CXX": str(compiler), "BITNET_LIT_CACHE": str(cache), "ASAN_OPTIONS": "detect_leaks=0"}
    variables["CUDA_VISIBLE_DEVICES"] = ""  # CUDA needs the addresses that the sanitizer takes
    return Fuzzer(root / "fuzz", memory=None, preload=preload, environment=variables)


def told(result: Mapping[str, Any]) -> str:
    """A result for a reader, with the command that gives it again."""
    again = f"python -m tests.fuzz.fuzzer {result['input']}"
    return f"{again}: {result['wrong']} ({result['done']})\n{result['output']}"


if __name__ == "__main__":
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    fuzzer = sanitized(root) if sys.argv[2].startswith("engine-") else Fuzzer(root / "fuzz")
    outcome = fuzzer.alone(" ".join(sys.argv[1:4]))
    print(told(outcome))
    print(f"status {outcome['status']}; its folder is {fuzzer.root}/failures")
    fuzzer.server.close()
    sys.exit(bool(outcome["wrong"]))
