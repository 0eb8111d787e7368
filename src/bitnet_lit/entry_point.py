"""Every `python -m bitnet_lit.<command>` starts here: signals, standard streams and the exit status are set up.

This happens before anything heavy is imported. So a Ctrl-C during the import of PyTorch, an output on a full disk and a
terminal that shows ASCII only are handled too. A failure is reported in one line.

The exit status is 0 when the command is done, 1 when it failed, 2 when the user's input was wrong, and 128 + n when
signal n ended it.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from bitnet_lit import gpu_errors, interruptible
from bitnet_lit.errors import MESSAGES, Interruption, is_out_of_memory, one_line, read_errors
from bitnet_lit.process_end import leave_at_once

STDIN, STDOUT, STDERR = 0, 1, 2
_interruptions: list[int] = []  # numbers of the signals received; a library may replace the KeyboardInterrupt


def _prepare_streams() -> None:
    """Open the standard streams that the parent closed, and let outputs replace what their encoding cannot show.

    A closed stream is None in Python, and the next file that is opened would get its descriptor: an error message
    could then be written into a checkpoint. A write to a closed stdout fails as a write to a full disk does.
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


def interrupt(number: int) -> NoReturn:
    """End the command because of a signal: called by a signal's handler."""
    _interruptions.append(number)
    raise KeyboardInterrupt


def _hear_signals() -> None:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt, unless the parent process ignores them."""
    process = os.getpid()

    def handle(number: int, frame: types.FrameType | None) -> None:
        if os.getpid() != process:  # a forked child ends as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":  # an import cannot be undone
                os.write(STDERR, f"error: {_what_ended_it(number)}\n".encode())
                os._exit(128 + number)
            frame = frame.f_back
        interrupt(number)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, handle)


def _send_again_what_is_lost() -> None:
    """Let a signal come again whose exception Python ignores: one that leaves `__del__` or a callback of C."""
    other = sys.unraisablehook

    def hook(ignored: sys.UnraisableHookArgs) -> None:
        error = ignored.exc_value
        if isinstance(error, Interruption):
            number = error.stopped.status - 128
        elif isinstance(error, KeyboardInterrupt) and _interruptions:
            number = _interruptions[-1]
        else:
            other(ignored)
            return
        again = threading.Timer(0.01, os.kill, (os.getpid(), number))
        again.daemon = True
        with contextlib.suppress(RuntimeError):  # no thread starts any more, because the process ends
            again.start()

    sys.unraisablehook = hook


def interruption(error: BaseException) -> int | None:
    """Return the number of the signal that an exception comes from; None where it comes from none.

    After a signal any exception counts. A `finally` of Python's, Hydra's or OmegaConf's code that the KeyboardInterrupt
    meets before its variables are set raises an UnboundLocalError in its place.
    """
    if _interruptions:
        return _interruptions[-1]
    return signal.SIGINT if isinstance(error, KeyboardInterrupt) else None


@contextlib.contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the block, and not the command."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if interruption(error) != signal.SIGINT:
            raise
        _interruptions.clear()


def _what_ended_it(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def _let_threads_rest() -> None:
    """Shorten the busy waiting of PyTorch's CPU threads, which slows down a machine whose cores are all in use.

    GNU's OpenMP, which PyTorch's wheels for Linux contain, spins for milliseconds at the end of each parallel loop.
    When other processes need the cores, a thread spins while the thread that it waits for has no core. Training the
    demo model on two busy cores ran at 100 to 200 tokens/s, and at 900 to 1,500 with this setting. It must be set
    before PyTorch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _fail(error: object, status: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be full as well
        print(f"error: {one_line(error)}", file=sys.stderr)
    return status


def _status_of_error(error: BaseException) -> int:
    """Print in one line why the work failed, and return the exit status. What shows a bug of ours is raised again."""
    if isinstance(error, MESSAGES):
        return _fail(error, error.status)
    if gpu_errors.is_gpu_error(error) and not gpu_errors.wants_traceback():
        gpu_errors.note(error)
        return _fail(f"{gpu_errors.without_boilerplate(error)}: CUDA_LAUNCH_BLOCKING=1 shows where", 1)
    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        what = gpu_errors.without_boilerplate(error)
        return _fail(f"out of memory{f' ({what})' if what else ''}: take a smaller batch, context or model", 1)
    if isinstance(error, OSError):
        # Discard what is still buffered: Python would fail again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        if isinstance(error, BrokenPipeError):
            return 0  # the reader has what it wanted (evaluate | head)
        if error.filename is None and "temporary directory" in str(error):  # of tempfile and of matplotlib
            return _fail(f"{error.strerror or error}: set TMPDIR to a folder that can be written", 1)
        # An error of a file has its name. Outside of `disk_errors`, an error without a name comes from printing.
        name = "the output cannot be written" if error.filename is None else error.filename
        return _fail(f"{name}: {error.strerror or error}", 1)
    raise error


def _status_of(work: Callable[[], object]) -> int:
    """Do the work, and print a failure in one line.

    Returns:
        The exit status. An exception that shows a bug of ours is raised.
    """
    status = 0
    try:
        try:
            work()
        except SystemExit as end:  # Hydra's flags, and the end of a sweep
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        number = interruption(error)
        return _status_of_error(error) if number is None else _fail(_what_ended_it(number), 128 + number)
    except Interruption as error:  # it came while the handlers of a run were taken back
        return _status_of_error(error.stopped)
    return status


def run_command(command: str, task: Callable[[Any], Any], **options: Any) -> None:
    """Run `task(config)` with the config that the command line describes, and exit with the command's status.

    Args:
        command: name of the root config in conf/ and of its schema.
        task: called with the dataclass; a sweeper optimizes what it returns.
        options: further arguments of `cli.run`.
    """

    def compose_and_run() -> None:
        with read_errors("the current folder", "change to a folder that is there (cd)"):
            os.getcwd()
        from bitnet_lit.cli import run  # imports Hydra

        run(command, task, sys.argv[1:], **options)

    leave(compose_and_run)


def leave(work: Callable[[], object]) -> None:
    """Do the work of a command; exit with its status unless that is 0."""
    if sys.platform == "win32":
        sys.exit("error: bitnet-lit runs on Linux and macOS, not on Windows: use WSL, the Windows Subsystem for Linux")
    _prepare_streams()
    _let_threads_rest()
    _hear_signals()
    _send_again_what_is_lost()
    status = _status_of(work)
    gpu_errors.leave(status)
    if interruptible.is_running():
        leave_at_once(status)
    if status:
        sys.exit(status)
