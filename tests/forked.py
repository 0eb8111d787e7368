"""Many commands in processes of their own, at the price of one start.

`import torch, lightning, hydra` takes seconds, and the tests of faults and damaged inputs run thousands of commands. So
one process, the server, imports everything once and forks a child for each command. The child begins as a fresh
interpreter that has finished its imports: what it does, leaves in memory or dies of stays with it.

::

    with ForkServer() as server:
        result = server.run(call_command, "prepare", ["source=demo", "out=data"], cwd=folder)
        assert result.status == 0, result.output

`tests.support.run_command` does so for most commands of the tests, with one server for each process of pytest.

A target is a function at the top level of a module of tests/ with JSON arguments. What it raises ends the child as it
would end Python: SystemExit with its status, everything else with a traceback and status 1.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
IMPORTS = (
    *("torch", "lightning", "hydra", "sentencepiece", "tokenizers", "safetensors.torch", "gguf", "matplotlib.figure"),
    *("bitnet_lit.training.run", "bitnet_lit.training.resume", "bitnet_lit.runs.curves", "bitnet_lit.data.prepare"),
    *("bitnet_lit.reports.report_files",),
    *("bitnet_lit.exports.write", "bitnet_lit.inference.print_texts", "bitnet_lit.inference.evaluation"),
)


@dataclass(frozen=True)
class Result:
    """How a child ended.

    Attributes:
        status: exit status; of one that a signal ended, minus its number.
        output: stdout and stderr, in the order they were written.
        seconds: wall time.
    """

    status: int
    output: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    def __str__(self) -> str:
        said = self.output if len(self.output) < 800 else f"... {self.output[-800:]}"
        return f"status {self.status} after {self.seconds:.1f} s:\n{said}"


def call_command(name: str, arguments: Sequence[str]) -> None:
    """`python -m bitnet_lit.<name> <arguments>`."""
    sys.argv = [name, *arguments]
    sys.modules.pop(f"bitnet_lit.{name}", None)  # runpy warns of a module that is there already
    runpy.run_module(f"bitnet_lit.{name}", run_name="__main__", alter_sys=True)


def call_as_typed(name: str, arguments: Sequence[str], environment: Mapping[str, str], streams: Sequence[str]) -> None:
    """`python -m bitnet_lit.<name> <arguments>`, with an environment and files for stdin, stdout and stderr.

    As with `python -m`, modules beside the user are found, and what was left for the end of the process is done.
    """
    os.environ.clear()
    os.environ.update(environment)
    for number, (path, flags) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        os.dup2(os.open(path, flags), number)
    sys.path[0] = os.getcwd()
    try:
        call_command(name, arguments)
    finally:
        finish()


def finish() -> None:
    """Call what was registered with `atexit`, which `os._exit` leaves out."""
    atexit._run_exitfuncs()


class ForkServer:
    """The server, from the side of the test that asks.

    Args:
        preload: libraries to load before all others.
        environment: variables to set in it.
        imports: modules to import besides those of every command.
    """

    def __init__(
        self,
        preload: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
        imports: Sequence[str] = (),
    ) -> None:
        self._imports = imports
        # One thread a child: forked threads do not exist, and two test workers share the cores as it is.
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0", **(environment or {})}
        if preload:
            self._environment["LD_PRELOAD"] = ":".join(map(str, preload))
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.forked", *self._imports],
            cwd=REPOSITORY,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def run(
        self,
        target: Callable[..., None],
        *arguments: Any,
        cwd: Path,
        seconds: int = 120,
        memory: int | None = None,
        signals: Sequence[tuple[float, int]] = (),
        before: Sequence[Any] = (),
    ) -> Result:
        """Run a target in a child.

        Args:
            seconds: after which it counts as hanging: where it hangs goes to its output, and SIGALRM ends it.
            memory: bytes of address space that it may take beyond what the server has.
            signals: (seconds after the start, number) of signals to send to it.
            before: name and arguments of a C function of the preloaded library to call first.
        """
        name = f"{target.__module__}:{target.__qualname__}"
        asked = {
            "target": name,
            "arguments": arguments,
            "cwd": str(cwd),
            "seconds": seconds,
            "memory": memory,
            "signals": signals,
            "before": before,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, "the fork server died"
        except BaseException:  # a test that was stopped while it waited must not leave its answer to the next one
            self._process.kill()
            self._process.wait()
            self._process = self._start()
            raise
        return Result(**json.loads(answer))


def _limit(memory: int) -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))


def _child(asked: dict[str, Any], output: int) -> None:
    """Everything that happens in a child; it never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        devnull = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((devnull, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, buffering=1) for n, mode in enumerate("rww"))
        os.chdir(asked["cwd"])
        faulthandler.dump_traceback_later(asked["seconds"], file=2)
        signal.alarm(asked["seconds"] + 1)
        module, name = asked["target"].split(":")
        target = getattr(importlib.import_module(module), name)
        if asked["memory"]:
            _limit(asked["memory"])
        if asked["before"]:
            function, *arguments = asked["before"]
            getattr(ctypes.CDLL(None), function)(*(a.encode() if isinstance(a, str) else a for a in arguments))
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            target(*asked["arguments"])
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException as error:
            unheard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            if isinstance(error, KeyboardInterrupt) and unheard:  # before the command was there to hear it
                status = 128 + signal.SIGINT
            else:
                traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, OSError):
                stream.flush()
    finally:
        os._exit(status)


def _serve() -> None:
    """Read a request a line, fork, answer a line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an import prints is no answer
    for module in (*IMPORTS, *sys.argv[1:]):
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # so a collection in a child neither walks through what was imported nor copies its pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is pytest's
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile() as output:
            started = time.monotonic()
            child = os.fork()
            if child == 0:
                _child(asked, output.fileno())
            for after, number in sorted(asked["signals"]):
                time.sleep(max(0.0, started + after - time.monotonic()))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            seconds = time.monotonic() - started
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)  # processes that a killed one left behind
            output.seek(0)
            text = output.read().decode(errors="replace")
        answers.write(json.dumps({"status": status, "output": text, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    _serve()
