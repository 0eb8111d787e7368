"""Compile the native engine for this machine, once; later processes find it.

The library lies in a cache folder under a name that is a hash of the sources, the compiler and the processor, so
another version or another machine that shares the home folder makes its own. It is compiled to a temporary name and
renamed: two processes that start together both get a whole file. It is not part of the wheel because it uses the vector
instructions of the very processor it runs on.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = [
    *("-O3", "-std=c++20", "-march=native", "-fPIC", "-shared", "-pthread"),
    *("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),  # loops over floats become vector code
]


class NoCompilerError(RuntimeError):
    """The engine cannot be compiled here; says why."""


def cache_folder() -> Path:
    """Where compiled engines lie: $BITNET_LIT_CACHE, or bitnet_lit in the user's cache folder."""
    if folder := os.environ.get("BITNET_LIT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bitnet_lit"


def compiler() -> str:
    """The path of a C++ compiler: $CXX, or the first of the usual names that is installed.

    Raises:
        NoCompilerError: there is none.
    """
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            return path
    raise NoCompilerError("no C++ compiler (install g++ or clang++, or set CXX)")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


@cache
def library_path() -> Path:
    """The compiled library; compiles it if this machine has none.

    Raises:
        NoCompilerError: no compiler, or it failed.
    """
    command = compiler()
    version = subprocess.run([command, "--version"], capture_output=True, text=True).stdout
    sources = [*sorted(SOURCES.glob("*.h")), SOURCES / "engine.cpp"]
    content = b"".join(source.read_bytes() for source in sources)
    key = hashlib.sha256(content + repr((FLAGS, version, platform.machine(), _processor())).encode()).hexdigest()[:16]
    library = cache_folder() / f"engine-{key}.so"
    if not library.exists():
        temporary = library.with_name(f".{library.name}.{os.getpid()}.tmp")
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            arguments = [*FLAGS, str(SOURCES / "engine.cpp"), "-o", str(temporary)]
            result = subprocess.run([command, *arguments], capture_output=True, text=True)
            if result.returncode:
                raise NoCompilerError(f"{command} failed: {' '.join(result.stderr.split())[:300]}")
            os.replace(temporary, library)
        except OSError as error:
            raise NoCompilerError(f"{library.parent}: {error.strerror}") from None
        finally:
            temporary.unlink(missing_ok=True)
    return library
