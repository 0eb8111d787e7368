"""Compile the native engine for this machine, once; later processes find it.

The library lies in a cache folder as engine-<key>-<content>.so. The key is a hash of the sources, the compiler and the
processor, so another version or another machine that shares the home folder makes its own. The second part is the hash
of the file itself: one that was cut off or has flipped bits is compiled again. It is not part of the wheel because it
uses the vector instructions of the very processor it runs on.

Loading a library runs what is in it. So it is loaded only from a folder that is the user's alone (private_folder.py);
where there is none, or the system executes nothing there, it is compiled for this process and removed at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import pwd
import shlex
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from bitnet_lit.inference.engines.cpu.private_folder import make_private, why_not_private

SOURCES = Path(__file__).parent / "csrc"
FLAGS = [
    *("-O3", "-std=c++20", "-march=native", "-fPIC", "-shared", "-pthread"),
    *("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),  # loops over floats become vector code
]
VERSION_SECONDS, COMPILE_SECONDS = 20, 600  # a compiler that takes longer hangs


class NoCompilerError(RuntimeError):
    """The engine cannot be compiled or loaded here; says why."""


class _UnusableError(Exception):
    """A folder that the library cannot be kept in; says why."""


def cache_folders() -> list[Path]:
    """Where compiled engines may lie, the first choice first: $BITNET_LIT_CACHE, or bitnet_lit in the user's cache
    folder; then in the home folder that the system knows, if it is another.

    A relative XDG_CACHE_HOME or HOME counts as none, as the XDG Base Directory Specification says.
    """
    named = os.environ.get("BITNET_LIT_CACHE")
    cached, home = os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME", "")
    folders = [Path(named).absolute()] if named else []
    if not named and os.path.isabs(cached):
        folders.append(Path(cached) / "bitnet_lit")
    elif not named and os.path.isabs(home):
        folders.append(Path(home) / ".cache" / "bitnet_lit")
    with contextlib.suppress(KeyError):  # a user without an entry, as in some containers
        folders.append(Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache" / "bitnet_lit")
    return list(dict.fromkeys(folders))


def compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, which may hold options too, or the first of the usual names that is
    installed.

    Raises:
        NoCompilerError: there is none.
    """
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        with contextlib.suppress(ValueError):  # a quote that is never closed
            program, *options = shlex.split(name) or [""]
            if path := shutil.which(program):
                return [path, *options]
    raise NoCompilerError("no C++ compiler (install g++ or clang++, or set CXX)")


def _run(command: Sequence[str], seconds: int) -> subprocess.CompletedProcess[str]:
    """Run a compiler with all that it starts; nothing of it outlives the call.

    Raises:
        NoCompilerError: it does not start, or does not end.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise NoCompilerError(f"{command[0]}: {error.strerror}") from None
    try:
        said, wrong = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise NoCompilerError(f"{command[0]} did not end in {seconds} seconds (set CXX to another compiler)") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, said, wrong)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


class _Recipe:
    """How the library is compiled here.

    Attributes:
        key: a hash of all that the result depends on.
    """

    def __init__(self) -> None:
        self._command = [*compiler(), *FLAGS]
        version = _run([*compiler(), "--version"], VERSION_SECONDS).stdout
        sources = [*sorted(SOURCES.glob("*.h")), SOURCES / "engine.cpp"]
        content = b"".join(source.read_bytes() for source in sources)
        depends = repr((self._command, version, platform.machine(), _processor()))
        self.key = hashlib.sha256(content + depends.encode()).hexdigest()[:16]

    def compile(self, library: Path) -> None:
        """Write the library.

        Raises:
            NoCompilerError: the compiler says what is wrong, or does not end.
        """
        result = _run([*self._command, str(SOURCES / "engine.cpp"), "-o", str(library)], COMPILE_SECONDS)
        if result.returncode or not library.is_file():
            raise NoCompilerError(f"{self._command[0]} failed: {' '.join(result.stderr.split())[:300]}")


def _content(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:32]


def _kept(folder: Path, key: str) -> Path | None:
    """The library of that key that lies in `folder`, as it was written."""
    for library in sorted(folder.glob(f"engine-{key}-*.so")):
        if library.stem.endswith(f"-{_content(library)}"):
            return library
    return None


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits while another process compiles here; some network file systems cannot tell, and then both do."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _library_in(folder: Path, recipe: _Recipe) -> Path:
    """The library in `folder`; compiles it if there is none.

    Raises:
        _UnusableError, OSError: it cannot be kept there.
        NoCompilerError: it cannot be compiled.
    """
    folder = make_private(folder)
    if reason := why_not_private(folder):
        raise _UnusableError(reason)
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise _UnusableError(f"{folder} is mounted without execution")
    if found := _kept(folder, recipe.key):
        return found
    with _alone_in(folder):
        if found := _kept(folder, recipe.key):  # another process was faster
            return found
        for damaged in (*folder.glob(f"engine-{recipe.key}-*.so"), *folder.glob(".engine-*.tmp")):
            damaged.unlink(missing_ok=True)
        temporary = folder / f".engine-{recipe.key}.{os.getpid()}.tmp"
        if not os.access(folder, os.W_OK):
            raise _UnusableError(f"{folder} cannot be written")
        try:
            recipe.compile(temporary)
            library = folder / f"engine-{recipe.key}-{_content(temporary)}.so"
            os.replace(temporary, library)
        finally:
            temporary.unlink(missing_ok=True)
        return library


@cache
def _loaded() -> ctypes.CDLL | NoCompilerError:
    """`load_library`, or why it cannot be loaded: a compiler that hangs is not asked twice."""
    try:
        return load_library()
    except NoCompilerError as error:
        return error


def library() -> ctypes.CDLL:
    """The compiled engine, loaded once in a process.

    Raises:
        NoCompilerError: no compiler, it failed, or the system does not execute what it made.
    """
    loaded = _loaded()
    if isinstance(loaded, NoCompilerError):
        raise loaded
    return loaded


def load_library() -> ctypes.CDLL:
    """Load the compiled engine; compiles it if this machine has none.

    Raises:
        NoCompilerError: as for `library`.
    """
    recipe, reasons = _Recipe(), []
    for folder in cache_folders():
        try:
            return ctypes.CDLL(str(_library_in(folder, recipe)))
        except _UnusableError as error:
            reasons.append(str(error))
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
    with tempfile.TemporaryDirectory(prefix="bitnet_lit-") as scratch:  # for the user alone
        path = Path(scratch) / "engine.so"
        recipe.compile(path)
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            raise NoCompilerError(f"the compiled engine cannot be loaded ({error})") from None
    reason = "; ".join(reasons) or "there is no home folder"
    warnings.warn(
        f"the compiled engine cannot be kept: {reason}: it is compiled again by each process; set BITNET_LIT_CACHE to "
        "a folder that is yours alone",
        stacklevel=2,
    )
    return loaded
