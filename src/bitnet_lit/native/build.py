"""Compiling C++ for this machine: once, because later processes find the library.

A library is kept in a cache folder as <name>-<key>-<content>.so. The key is a hash of the sources, the compiler and
the processor, so another version of the sources, or another machine that shares the home folder, compiles its own. The
second part is a hash of the file: a library that was cut off or has flipped bits is compiled again. The wheel carries
sources instead of a library, because the library uses the vector instructions of the very processor it runs on.

Loading a library runs the code in it. So it is loaded only from a folder in which nobody else can write
(private_folder.py). Where there is no such folder, or the system executes nothing in it, the library is compiled for
this process alone and removed when it is loaded.
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
from typing import NamedTuple

from bitnet_lit.native.private_folder import make_private, why_not_private

SHARED = Path(__file__).parent / "csrc"
"""The folder of headers that all libraries may include."""
FLAGS = [
    *("-O3", "-std=c++20", "-march=native", "-fPIC", "-shared", "-pthread"),
    *("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),  # loops over floats become vector code
]
VERSION_SECONDS, COMPILE_SECONDS = 20, 600
"""After these a compiler is taken to hang, and is ended."""


class Source(NamedTuple):
    """A Source names the file that a library is compiled from.

    Attributes:
        name: of the library, a word.
        main: the file to compile. It may include the headers in its folder and in `SHARED`.
    """

    name: str
    main: Path


class NoCompilerError(RuntimeError):
    """A library cannot be compiled or loaded here; the message says why."""


class _UnusableError(Exception):
    """The library cannot be kept in a folder; the message says why."""


def cache_folders() -> list[Path]:
    """Folders for the compiled library, the first choice first.

    $BITNET_LIT_CACHE is the first, or where it is not set bitnet_lit in the user's cache folder. The second is the
    cache folder in the home folder that the system has on record, if that is another one.

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
    """The command of a C++ compiler: $CXX, which may hold options too, or else the first installed one of c++, g++ and
    clang++.

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
    """Run a compiler. Neither it nor a process that it started outlives the call.

    Raises:
        NoCompilerError: it cannot be started, or does not end within `seconds`.
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
    """The processor's features, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


class _Recipe:
    """How a library is compiled here.

    Attributes:
        name: that of the source.
        key: a hash of everything that the compiled library depends on.
    """

    def __init__(self, source: Source) -> None:
        self.name, self._main = source
        folders = dict.fromkeys((self._main.parent, SHARED))
        self._command = [*compiler(), *FLAGS, *(f"-I{folder}" for folder in folders)]
        version = _run([*compiler(), "--version"], VERSION_SECONDS).stdout
        files = [*(header for folder in folders for header in sorted(folder.glob("*.h"))), self._main]
        content = b"".join(file.read_bytes() for file in files)
        depends = repr((compiler(), FLAGS, version, platform.machine(), _processor()))
        self.key = hashlib.sha256(content + depends.encode()).hexdigest()[:16]

    def compile(self, library: Path) -> None:
        """Compile the source to the file `library`.

        Raises:
            NoCompilerError: the compiler fails, or does not end.
        """
        result = _run([*self._command, str(self._main), "-o", str(library)], COMPILE_SECONDS)
        if result.returncode or not library.is_file():
            said = " ".join(result.stderr.split())[:300] or f"it said nothing, status {result.returncode}"
            raise NoCompilerError(f"{self._command[0]} failed: {said}")


def _content(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:32]


def _kept(folder: Path, recipe: _Recipe) -> Path | None:
    """The undamaged library of `recipe` in `folder`; None where there is none."""
    for library in sorted(folder.glob(f"{recipe.name}-{recipe.key}-*.so")):
        if library.stem.endswith(f"-{_content(library)}"):
            return library
    return None


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits while another process compiles in `folder`. Some network file systems have no locks; there both compile."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _folder_of_code(folder: Path) -> Path:
    """Make `folder` if it is missing, and return it if code can be loaded from there.

    Raises:
        _UnusableError, OSError: it cannot; the message says why.
    """
    folder = make_private(folder)
    if reason := why_not_private(folder):
        raise _UnusableError(reason)
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise _UnusableError(f"{folder} is mounted without execution")
    return folder


def writable_cache_folder(name: str) -> Path | None:
    """Return the folder `name` in the first of `cache_folders` where this user can keep code, or None."""
    for folder in cache_folders():
        with contextlib.suppress(_UnusableError, OSError):
            place = _folder_of_code(folder / name)
            if os.access(place, os.W_OK):
                return place
    return None


def _library_in(folder: Path, recipe: _Recipe) -> Path:
    """The library in `folder`, compiled if it is not there yet.

    Raises:
        _UnusableError, OSError: the library cannot be kept in `folder`.
        NoCompilerError: it cannot be compiled.
    """
    folder = _folder_of_code(folder)
    if found := _kept(folder, recipe):
        return found
    with _alone_in(folder):
        if found := _kept(folder, recipe):  # another process was faster
            return found
        for damaged in (*folder.glob(f"{recipe.name}-{recipe.key}-*.so"), *folder.glob(f".{recipe.name}-*.tmp")):
            damaged.unlink(missing_ok=True)
        temporary = folder / f".{recipe.name}-{recipe.key}.{os.getpid()}.tmp"
        if not os.access(folder, os.W_OK):
            raise _UnusableError(f"{folder} cannot be written")
        try:
            recipe.compile(temporary)
            library = folder / f"{recipe.name}-{recipe.key}-{_content(temporary)}.so"
            os.replace(temporary, library)
        finally:
            temporary.unlink(missing_ok=True)
        return library


@cache
def _loaded(source: Source) -> ctypes.CDLL | NoCompilerError:
    """The result of `load_library`, or its exception: a compiler that fails is not run again in this process."""
    try:
        return load_library(source)
    except NoCompilerError as error:
        return error


def library(source: Source) -> ctypes.CDLL:
    """The compiled library of `source`, which is loaded once in a process.

    Raises:
        NoCompilerError: there is no compiler, it fails, or the system does not execute the library.
    """
    loaded = _loaded(source)
    if isinstance(loaded, NoCompilerError):
        raise loaded
    return loaded


def is_kept(source: Source) -> bool:
    """Return whether a process before this one has compiled `source`, so that `library` only loads it."""
    try:
        recipe = _Recipe(source)
    except NoCompilerError:
        return False
    for folder in cache_folders():
        with contextlib.suppress(OSError):  # on a new machine the folder is not there yet
            folder = folder.resolve(strict=True)
            if why_not_private(folder) is None and _kept(folder, recipe):
                return True
    return False


def load_library(source: Source) -> ctypes.CDLL:
    """Load the compiled library of `source`, compiling it if this machine has none.

    Raises:
        NoCompilerError: as for `library`.
    """
    recipe, reasons = _Recipe(source), []
    for folder in cache_folders():
        try:
            return ctypes.CDLL(str(_library_in(folder, recipe)))
        except _UnusableError as error:
            reasons.append(str(error))
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
    try:
        temporary = tempfile.TemporaryDirectory(prefix="bitnet_lit-")  # for the user alone
    except OSError as error:
        said = "; ".join([*reasons, error.strerror or str(error)])
        raise NoCompilerError(f"the compiled {source.name} has no place ({said}): set BITNET_LIT_CACHE") from None
    with temporary as scratch:
        path = Path(scratch) / f"{source.name}.so"
        recipe.compile(path)
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            raise NoCompilerError(f"the compiled {source.name} cannot be loaded ({error})") from None
    reason = "; ".join(reasons) or "there is no home folder"
    warnings.warn(
        f"the compiled {source.name} cannot be kept: {reason}: it is compiled again by each process; set "
        "BITNET_LIT_CACHE to a folder that is yours alone",
        stacklevel=2,
    )
    return loaded
