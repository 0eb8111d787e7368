"""The native engine's own test (native/engine_test.cpp), compiled for several processors and with sanitizers."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from bitnet_lit.inference.engines.cpu.native import ENGINE
from bitnet_lit.native.build import FLAGS, SHARED

TEST = Path(__file__).parent / "native" / "engine_test.cpp"
COMMON = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC", "-march=native", "-O3")]
# The AVX-512 headers of GCC 12 read a variable before it is set, on purpose; -Wall tells of it where they are used.
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
# Checks on every index of the standard library, with which hardened systems compile.
ASSERTIONS = "-D_GLIBCXX_ASSERTIONS"
SANITIZERS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", ASSERTIONS]
X86 = platform.machine() == "x86_64"
COMPILER = shutil.which("g++") or shutil.which("c++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (install g++)")


def run(folder, compiler, flags, emulator=()):
    """Compile the test, run it, and return what it printed; it must have found nothing."""
    program = folder / "engine_test"
    command = [
        compiler,
        *COMMON,
        *flags,
        *WARNINGS,
        f"-I{ENGINE.main.parent}",
        f"-I{SHARED}",
        str(TEST),
        "-o",
        str(program),
    ]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr[:3000]
    result = subprocess.run([*emulator, str(program)], capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, (result.stdout + result.stderr)[:3000]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        pytest.param(["-O3", "-march=native"], "", id="native"),
        pytest.param(["-O2", "-march=x86-64"], "plain", id="plain", marks=pytest.mark.skipif(not X86, reason="x86")),
    ],
)
def test_kernels_and_steps(tmp_path, flags, name):
    assert run(tmp_path, COMPILER, flags).startswith(name)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(tmp_path, sanitizer):
    """No read out of bounds, no undefined arithmetic, no race between the threads of a step."""
    assert "0 failures" in run(tmp_path, COMPILER, [*SANITIZERS, "-march=native", f"-fsanitize={sanitizer}"])


@pytest.mark.slow
@pytest.mark.arm
def test_arm_kernels_under_emulation(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    flags = ["-O2", "-march=armv8.2-a+dotprod+fp16", "-static", "-DEMULATED"]
    assert run(tmp_path, compiler, flags, [emulator]).startswith("neon-dotprod")
