"""Where compiled C++ is loaded from: only a folder that is the user's alone, and only as it was written."""

import os
import stat
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from bitnet_lit.inference.engines.cpu.native import ENGINE
from bitnet_lit.native import build
from bitnet_lit.native.build import NoCompilerError, cache_folders, compiler
from bitnet_lit.native.private_folder import make_private, why_not_private

try:
    compiler()
except NoCompilerError as error:
    pytest.skip(str(error), allow_module_level=True)
load_library = partial(build.load_library, ENGINE)
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to another user")


def executable(path, script):
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return path


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """A compiler that takes no time: it compiles another library, and notes how often. Returns a function that counts,
    and the cache folder."""
    real, log = build.compiler(), tmp_path / "compiled"
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int small() { return 7; }')
    script = f"""
if [ "$1" = --version ]; then echo small 1; exit; fi
echo . >> {log}
sleep "$SLOW"
for last; do :; done
exec {real[0]} -shared -fPIC {source} -o "$last"
"""
    monkeypatch.setenv("CXX", str(executable(tmp_path / "compiler", script)))
    monkeypatch.setenv("SLOW", "0")
    monkeypatch.setenv("BITNET_LIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(build.pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError()))
    return (lambda: len(log.read_text().splitlines()) if log.exists() else 0), tmp_path / "cache"


def place(library):
    return Path(library._name).parent


def test_it_is_compiled_once_and_kept(compiled):
    count, cache = compiled
    first, second = load_library(), load_library()
    assert first.small() == second.small() == 7 and count() == 1
    assert place(first) == place(second) == cache and len(list(cache.iterdir())) == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "damage",
    [
        lambda library: library.write_bytes(library.read_bytes()[:5000]),
        lambda library: library.write_bytes(b""),
        lambda library: library.write_bytes(bytes([library.read_bytes()[0]]) + library.read_bytes()[1:-1] + b"x"),
        lambda library: library.rename(library.with_name(library.name[:-20] + "0" * 17 + ".so")),
    ],
    ids=["cut", "empty", "flipped", "renamed"],
)
def test_a_damaged_one_is_compiled_again(compiled, damage):
    count, cache = compiled
    load_library()
    (library,) = cache.iterdir()
    content = library.read_bytes()
    library.unlink()  # the file that is loaded stays as it is
    library.write_bytes(content)
    damage(library)
    leftover = cache / ".engine-0123456789abcdef.99.tmp"  # of a process that was killed while it compiled
    leftover.write_bytes(b"half")
    assert load_library().small() == 7 and count() == 2
    assert len(list(cache.iterdir())) == 1


def refused(compiled, reason):
    """The library is compiled for this process alone, whatever lies in the cache folder, and nothing is left."""
    count, cache = compiled
    before = count()
    with pytest.warns(UserWarning, match=f"cannot be kept: .*{reason}.*set BITNET_LIT_CACHE"):
        library = load_library()
    assert library.small() == 7 and count() == before + 1
    assert cache not in Path(library._name).parents and not place(library).exists()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757, 0o702])
def test_a_folder_that_others_can_write_is_refused(compiled, mode):
    _, cache = compiled
    load_library()
    cache.chmod(mode)
    refused(compiled, f"{cache} can be written by others")


def test_a_folder_that_others_can_replace_is_refused(compiled, monkeypatch):
    _, cache = compiled
    above = cache / "above"
    monkeypatch.setenv("BITNET_LIT_CACHE", str(above / "cache"))
    load_library()
    above.chmod(0o777)
    refused(compiled, f"{above} can be written by others")
    above.chmod(0o1777)  # as /tmp: only its owner can rename the folder
    assert place(load_library()) == above / "cache"
    link = cache / "link"
    link.symlink_to(above)
    above.chmod(0o777)
    monkeypatch.setenv("BITNET_LIT_CACHE", str(link / "cache"))
    refused(compiled, f"{above} can be written by others")


@as_root
def test_a_folder_of_another_user_is_refused(compiled):
    _, cache = compiled
    load_library()
    os.chown(cache, 12345, 12345)
    refused(compiled, f"{cache} belongs to another user")
    os.chown(cache, 0, 0)
    os.chown(cache.parent, 12345, 12345)
    refused(compiled, f"{cache.parent} belongs to another user")


def test_the_users_own_group_may_write(tmp_path, monkeypatch):
    folder = make_private(tmp_path / "folder")
    folder.chmod(0o770)
    module = sys.modules[why_not_private.__module__]
    for name, members, private in (("me", [], True), ("me", ["me"], True), ("me", ["you"], False), ("us", [], False)):
        monkeypatch.setattr(module.pwd, "getpwuid", lambda uid: type("User", (), {"pw_name": "me"}))
        monkeypatch.setattr(module.grp, "getgrgid", lambda gid: type("Group", (), {"gr_name": name, "gr_mem": members}))  # noqa: B023
        assert (why_not_private(folder) is None) == private, (name, members)


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="the system does not say how a mount was made")
def test_a_mount_without_execution_is_refused(compiled, monkeypatch):
    real = os.statvfs

    def statvfs(path):
        fields = list(real(path))
        fields[8] |= os.ST_NOEXEC  # f_flag
        return os.statvfs_result(fields)

    monkeypatch.setattr(build.os, "statvfs", statvfs)
    refused(compiled, "mounted without execution")


def test_where_nothing_is_executed_the_reason_is_said(compiled, monkeypatch):
    def refuse(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(build.ctypes, "CDLL", refuse)
    with pytest.raises(NoCompilerError, match="cannot be loaded .*failed to map segment"):
        load_library()


def test_a_folder_that_cannot_be_made_is_refused(compiled, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BITNET_LIT_CACHE", str(tmp_path / "file" / "cache"))
    refused(compiled, "(Not a directory|File exists)")


def test_without_any_place_for_it_the_reason_is_said(compiled, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(build, "cache_folders", lambda: [tmp_path / "file" / "cache"])
    with monkeypatch.context() as patched:  # pytest takes temporary files too
        patched.setattr(tempfile, "tempdir", None)
        patched.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "file")])
        with pytest.raises(NoCompilerError, match="has no place .*No usable temporary directory.*BITNET_LIT_CACHE"):
            load_library()


def test_first_uses_at_once_compile_once(compiled, monkeypatch):
    count, _ = compiled
    monkeypatch.setenv("SLOW", "0.5")
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: load_library(), range(4)))
    assert count() == 1 and {library.small() for library in libraries} == {7}


def test_where_the_cache_folder_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BITNET_LIT_CACHE", raising=False)
    monkeypatch.setattr(build.pwd, "getpwuid", lambda uid: type("User", (), {"pw_dir": "/known"}))
    known, home = Path("/known/.cache/bitnet_lit"), Path("/home/me/.cache/bitnet_lit")
    for cached, user, first in (
        ("", "/home/me", home),  # set and empty is as not set
        ("relative", "/home/me", home),
        (None, "/home/me", home),
        ("/var/cache/me", "/home/me", Path("/var/cache/me/bitnet_lit")),
        (None, None, known),
        ("", "", known),
        (".", "also/relative", known),
    ):
        for key, value in (("XDG_CACHE_HOME", cached), ("HOME", user)):
            monkeypatch.delenv(key, raising=False) if value is None else monkeypatch.setenv(key, value)
        assert cache_folders() == list(dict.fromkeys([first, known])), (cached, user)
    monkeypatch.setenv("BITNET_LIT_CACHE", "mine")
    assert cache_folders() == [tmp_path / "mine", known]


@pytest.mark.parametrize("hangs", ["--version", "compiling"])
def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(compiled, tmp_path, monkeypatch, hangs):
    pid = tmp_path / "pid"
    script = f'if [ "$1" = --version ] && [ {hangs} != --version ]; then exit; fi\nsleep 1000 & echo $! > {pid}; wait'
    monkeypatch.setenv("CXX", str(executable(tmp_path / "hangs", script)))
    monkeypatch.setattr(build, "VERSION_SECONDS", 1)
    monkeypatch.setattr(build, "COMPILE_SECONDS", 1)
    start = time.monotonic()
    with pytest.raises(NoCompilerError, match="hangs did not end in 1 seconds"):
        load_library()
    assert time.monotonic() - start < 60
    for _ in range(100):  # the system may take a moment to remove it
        if not Path(f"/proc/{int(pid.read_text())}/cmdline").exists():
            break
        if not Path(f"/proc/{int(pid.read_text())}/cmdline").read_bytes():
            break  # ended, and not yet waited for by whoever does that here
        time.sleep(0.1)
    else:
        pytest.fail("what the compiler started still runs")


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'no such flag é\n' >&2; exit 1", "failed: no such flag"),
        ("kill -9 $$", "failed: it said nothing, status -9"),
        ("exit 0", "failed"),
        (None, "Exec format error"),
    ],
    ids=["fails", "is killed", "writes nothing", "no program"],
)
def test_a_compiler_that_fails_says_why(compiled, tmp_path, monkeypatch, script, says):
    path = executable(tmp_path / "fails", script or "")
    if script is None:
        path.write_bytes(b"\0\1\2")
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(NoCompilerError, match=says):
        load_library()


def test_a_compiler_that_is_not_there_is_passed_over(compiled, monkeypatch):
    for name in ("/no/such/compiler", "'", "   ", ""):
        monkeypatch.setenv("CXX", name)
        assert compiler()[0].endswith(("c++", "g++", "clang++"))
    monkeypatch.setenv("CXX", "env -u SLOW g++ -O1")
    assert Path(compiler()[0]).name == "env" and compiler()[1:] == ["-u", "SLOW", "g++", "-O1"]


def test_a_compiler_is_asked_once_in_a_process(compiled, tmp_path, monkeypatch):
    count, _ = compiled
    monkeypatch.setenv("CXX", str(executable(tmp_path / "fails", f"echo . >> {tmp_path / 'compiled'}; exit 1")))
    build._loaded.cache_clear()
    try:
        for _ in range(3):
            with pytest.raises(NoCompilerError):
                build.library(ENGINE)
        assert count() == 2  # its version, and its attempt
    finally:
        build._loaded.cache_clear()
