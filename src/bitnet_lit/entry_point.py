"""Signals, streams and the exit status of a process, for every `python -m bitnet_lit.<command>`.

A command starts here, before anything heavy is imported, so that a Ctrl-C while PyTorch is being imported, a terminal
that shows ASCII only, or an output that is full end as they should: in one line.

Exit status: 0 done, 1 failed, 2 the user's input was wrong, 128 + n ended by signal n.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

from bitnet_lit.errors import ModelError, ParityError, TrainingStopped, UserError, is_out_of_memory, one_line

STDIN, STDOUT, STDERR = 0, 1, 2
interruptions: list[int] = []
"""The numbers of the signals that came: a library may turn the exception into one of its own."""


def _prepare_streams() -> None:
    """Give every standard stream a file, and let the outputs replace what their encoding cannot show.

    A stream that the parent closed is None in Python, and the next file that is opened takes its number: then a
    message would go into a checkpoint. What is written to a closed stdout fails like a write to a full disk.
    """
    for number, name in ((STDIN, "stdin"), (STDOUT, "stdout"), (STDERR, "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_WRONLY if number == STDERR else os.O_RDONLY)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            stream = os.fdopen(number, "r" if number == STDIN else "w", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper) and output.errors in ("strict", "surrogateescape"):
            output.reconfigure(errors="replace")


def _hear_signals() -> None:
    """Let Ctrl-C and SIGTERM end the command in one line, unless the parent wants them ignored."""
    process = os.getpid()

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        if os.getpid() != process:  # a child that was forked: it ends as if nobody had set a handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":  # an import cannot be gone on with
                os.write(STDERR, f"error: {_what_ended_it(number)}\n".encode())
                os._exit(128 + number)
            frame = frame.f_back
        interruptions.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interrupt)


def _what_ended_it(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def _let_threads_rest() -> None:
    """Let PyTorch's threads on the CPU sleep soon after they have waited in vain for each other.

    GNU's OpenMP, which PyTorch's wheels for Linux carry, spins for milliseconds at the end of each parallel loop. Where
    other processes need the cores, a thread spins while the one that it waits for has no core: training the demo model
    on two busy cores ran at 100 to 200 tokens/s, and at 900 to 1,500 with this. It must be set before PyTorch is
    imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _fail(error: object, status: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be full as well
        print(f"error: {one_line(error)}", file=sys.stderr)
    return status


def _status_of(work: Callable[[], object]) -> int:
    """Do the work; print what went wrong in one line.

    Returns:
        The exit status. What is a bug of ours is raised.
    """
    status = 0
    try:
        try:
            work()
        except SystemExit as end:  # Hydra's flags, and the end of a sweep
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
    except (UserError, TrainingStopped) as error:
        return _fail(error, error.status)
    except (ParityError, ModelError) as error:
        return _fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(f"out of memory ({error}): take a smaller batch, context or model", 1)
    except OSError as error:
        # Let what is left go nowhere: Python would fail again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        if isinstance(error, BrokenPipeError):
            return 0  # the reader has what it wanted (evaluate | head)
        # Files are opened by name; what is written without one, outside of `disk_errors`, is what was printed.
        name = "the output cannot be written" if error.filename is None else error.filename
        return _fail(f"{name}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        number = interruptions[-1] if interruptions else signal.SIGINT
        return _fail(_what_ended_it(number), 128 + number)
    return status


def run_command(command: str, task: Callable[[Any], Any], **options: Any) -> None:
    """Run `task(config)` with the config that the command line describes, and leave with its exit status.

    Args:
        command: name of the root config in conf/ and of its schema.
        task: called with the dataclass; what it returns is what a sweeper optimizes.
        options: of `cli.run`.
    """

    def compose_and_run() -> None:
        from bitnet_lit.cli import run  # with Hydra

        run(command, task, sys.argv[1:], **options)

    leave(compose_and_run)


def leave(work: Callable[[], object]) -> None:
    """Do the work of a command and leave the process with the exit status that it comes to."""
    if sys.platform == "win32":
        sys.exit("error: bitnet-lit runs on Linux and macOS, not on Windows: use WSL, the Windows Subsystem for Linux")
    _prepare_streams()
    _let_threads_rest()
    _hear_signals()
    if status := _status_of(work):
        sys.exit(status)
