"""Files and folders that are old or new: what is replaced, what is refused, and what a kill at any operation leaves."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from bitnet_lit.errors import DiskError, UserError, disk_errors
from bitnet_lit.files import atomic
from bitnet_lit.files.atomic import atomic_file, atomic_folder
from bitnet_lit.files.temporary_paths import remove_leftovers
from tests.support import names_are_any_bytes, needs_dev_full

DEAD = 2**22 + 1  # beyond the largest number that Linux gives a process


def write(path, text="new"):
    with atomic_file(path) as temporary:
        temporary.write_text(text)


OURS = {"a", "b", "c"}


def write_folder(path, **files):
    with atomic_folder(path, lambda folder: OURS) as temporary:
        for name, text in files.items():
            (temporary / name).write_text(text)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed_at(number, task):
    """Run `task` in a child that dies before its `number`-th file operation; whether it came so far."""
    child = os.fork()
    if child == 0:
        left = number

        def count(event, arguments):
            nonlocal left
            if event.split(".")[0] in ("os", "open", "shutil", "ctypes", "fcntl"):
                left -= 1
                if left < 0:
                    os._exit(9)

        status = 1
        try:
            sys.addaudithook(count)
            task()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").write_text("old")
    (tmp_path / "link").symlink_to("disk/real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "real").read_text() == "new"
    (tmp_path / "dangling").symlink_to("disk/made")
    write(tmp_path / "dangling")
    assert (tmp_path / "disk" / "made").read_text() == "new"

    (tmp_path / "disk" / "folder").mkdir()
    (tmp_path / "folder").symlink_to("disk/folder")
    write_folder(tmp_path / "folder", a="1")
    assert (tmp_path / "folder").is_symlink() and tree(tmp_path / "disk" / "folder") == {"a": "1"}
    assert not [name for name in os.listdir(tmp_path) + os.listdir(tmp_path / "disk") if name.endswith(".tmp")]


@pytest.mark.parametrize("writer", [write, write_folder])
def test_what_is_no_file_or_folder_is_refused_and_stays(tmp_path, monkeypatch, writer):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")  # an absolute path may be longer than a socket's address
        wrong = {"pipe": "a named pipe", "loop": "a link that leads", "socket": "a socket", "/dev/null": "a device"}
        wrong |= {"folder": "is a folder, not a file"} if writer is write else {"file": "is a file, not a folder"}
        for name, what in wrong.items():
            before = os.lstat(tmp_path / name)
            with pytest.raises(UserError, match=what) as error:
                writer(tmp_path / name)
            assert "\n" not in str(error.value)
            assert os.path.samestat(os.lstat(tmp_path / name), before), name
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "loop", "pipe", "socket"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_an_error_names_the_target_and_not_its_temporary_name(writer):
    with (
        pytest.raises(UserError, match=r"^out=/proc/x: cannot be written \(not permitted\): choose another out=$"),
        disk_errors("out=/proc/x", refused="choose another out="),
        writer(Path("/proc/x")),
    ):
        pass


def test_the_current_folder_and_a_mount_point_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the current folder"):
        write_folder(Path("."), a="1")
    with pytest.raises(UserError, match="is a mount point"):
        write_folder(Path("/"), a="1")


@pytest.mark.parametrize(
    "name",
    [
        "n" * 255,
        "\N{LATIN SMALL LETTER E WITH ACUTE}" * 127,
        "a b\nc",
        "[x]*",
        pytest.param("\udcff", marks=names_are_any_bytes),
    ],
)
def test_any_name_that_the_disk_holds(tmp_path, name):
    for text in ("1", "2"):
        write(tmp_path / name, text)
        assert (tmp_path / name).read_text() == text
        write_folder(tmp_path / "below" / name, a=text)
        assert tree(tmp_path / "below" / name) == {"a": text}
    assert len(os.listdir(tmp_path)) == 2


def test_of_a_folder_only_what_its_writer_wrote_is_replaced(tmp_path):
    write_folder(tmp_path / "m", a="1", b="1")
    (tmp_path / "m" / "README.md").write_text("mine")
    (tmp_path / "m" / ".git").mkdir()
    (tmp_path / "m" / ".git" / "HEAD").write_text("main")
    write_folder(tmp_path / "m", a="2", c="2")
    assert tree(tmp_path / "m") == {"a": "2", "c": "2", "README.md": "mine", ".git/HEAD": "main"}
    with pytest.raises(UserError, match=r"README\.md: a new file needs this name"):
        write_folder(tmp_path / "m", a="3", **{"README.md": "3"})
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "m", lambda folder: OURS) as temporary:
        (temporary / "a").write_text("4")
        1 / 0  # noqa: B018
    assert tree(tmp_path / "m") == {"a": "2", "c": "2", "README.md": "mine", ".git/HEAD": "main"}
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("exchange", ["one call", "two renames"])
def test_a_kill_at_any_operation_loses_nothing(tmp_path, monkeypatch, exchange):
    """Killed, and killed again while the next write cleans up; then the folder is whole, and nothing else is left."""
    if exchange == "two renames":
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())
    mine, old, new = {"README.md": "mine", ".git/HEAD": "main"}, {"a": "1", "b": "1"}, {"a": "2", "c": "2"}
    for second in (None, 3, 9, 17):
        number = 0
        while True:
            root = tmp_path / f"{second} {number}"
            write_folder(root / "m", **old)
            (root / "m" / ".git").mkdir()
            for name, text in mine.items():
                (root / "m" / name).write_text(text)
            killed = killed_at(number, lambda root=root: write_folder(root / "m", **new))
            if second is not None:
                killed_at(second, lambda root=root: remove_leftovers(root))
            else:
                found = tree(root)
                at_place = {name[2:]: text for name, text in found.items() if name.startswith("m/")}
                ours = {name: text for name, text in at_place.items() if name in OURS}
                if exchange == "one call" or ours:
                    assert ours in (old, new), (number, found)
                for name, text in mine.items():  # in its place, or beside it until the next command
                    assert text in [t for n, t in found.items() if n.endswith(name)], (number, found)
            remove_leftovers(root)
            assert os.listdir(root) == ["m"], number
            assert tree(root / "m") in ({**mine, **old}, {**mine, **new}), number
            write_folder(root / "m", **new)
            assert tree(root) == {f"m/{name}": text for name, text in {**mine, **new}.items()}
            if not killed:
                break
            number += 1
        assert number > 20


def test_a_kill_during_the_first_write_leaves_nothing(tmp_path):
    number = 0
    while killed_at(number, lambda: (write_folder(tmp_path / "m", a="1"), write(tmp_path / "f"))):
        remove_leftovers(tmp_path)
        assert tree(tmp_path) in ({}, {"m/a": "1"}, {"m/a": "1", "f": "new"})
        assert {name[0] for name in os.listdir(tmp_path)} <= {"m", "f"}
        number += 1
    assert number > 20 and tree(tmp_path) == {"m/a": "1", "f": "new"}


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    (tmp_path / f".metrics.csv.{DEAD}.tmp").write_text("half")
    (tmp_path / f".f.{os.getpid()}.tmp").write_text("of an earlier life")
    (tmp_path / f".model.{DEAD}.tmp").mkdir()  # as versions before the journal left it
    (tmp_path / f".model.{DEAD}.tmp" / "config.json").write_text("half")
    (tmp_path / ".thesis.tmp").write_text("mine")
    (tmp_path / "a.12.tmp").write_text("mine")
    (tmp_path / ".f.1.tmp").write_text("of a living process")
    remove_leftovers(tmp_path, "other*")
    assert len(os.listdir(tmp_path)) == 6
    with atomic_file(tmp_path / "f") as temporary, atomic_folder(tmp_path / "m") as folder:
        remove_leftovers(tmp_path)
        assert temporary.exists() and folder.exists()
        kept = {".thesis.tmp", "a.12.tmp", ".f.1.tmp"}
        assert set(os.listdir(tmp_path)) == kept | {temporary.name, folder.parent.name}
    os.utime(tmp_path / ".f.1.tmp", (time.time() - 7200,) * 2)  # by now the number is another process's
    remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == {".thesis.tmp", "a.12.tmp", "f", "m"}
    remove_leftovers(tmp_path / "nowhere")


def test_a_leftover_of_an_older_version_gives_the_users_files_back(tmp_path):
    write_folder(tmp_path / "model", a="new")
    (tmp_path / "model" / "notes").write_text("of today")
    old = tmp_path / f".model.{DEAD}.tmp"
    old.mkdir()
    for name in ("a", "notes", "README.md"):
        (old / name).write_text("old")
    write_folder(tmp_path / "model", a="newer")
    # What both have is the writer's, as far as an older version tells.
    assert tree(tmp_path) == {"model/a": "newer", "model/notes": "of today", "model/README.md": "old"}


def test_a_name_that_is_taken_meanwhile_is_not_overwritten(tmp_path):
    write_folder(tmp_path / "m", a="1")
    holder = tmp_path / f".m.{DEAD}.tmp"
    (holder / "new").mkdir(parents=True)
    (holder / "lock").touch()
    (holder / "names").write_text(json.dumps(["a"]))
    (holder / "new" / "README.md").write_text("earlier")
    (tmp_path / "m" / "README.md").write_text("later")
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"m/a": "1", "m/README.md": "later", "m/README.md.kept": "earlier"}


@pytest.mark.parametrize("names", ['["a', "", "[1]"])
def test_a_note_of_names_that_is_damaged_costs_the_user_nothing(tmp_path, names):
    write_folder(tmp_path / "m", a="1")
    holder = tmp_path / f".m.{DEAD}.tmp"
    (holder / "new").mkdir(parents=True)
    (holder / "lock").touch()
    (holder / "names").write_text(names)
    (holder / "new" / "README.md").write_text("mine")
    write_folder(tmp_path / "m", a="2")
    assert "mine" in tree(tmp_path).values() and (tmp_path / "m" / "a").read_text() == "2"


@pytest.mark.parametrize("number", [errno.EIO, errno.EBUSY])
def test_a_folder_that_cannot_be_cleaned_now_is_cleaned_later(tmp_path, monkeypatch, number):
    """A broken disk is said; a network mount that keeps files which somebody has open is not."""
    write_folder(tmp_path / "m", a="1")
    (tmp_path / "m" / "README.md").write_text("mine")
    real = os.unlink

    def fails(name, *arguments, **options):
        if os.path.basename(name) in OURS:
            raise OSError(number, os.strerror(number))
        real(name, *arguments, **options)

    monkeypatch.setattr(os, "unlink", fails)
    with pytest.raises(OSError) if number == errno.EIO else contextlib.nullcontext():
        write_folder(tmp_path / "m", a="2")
    assert tree(tmp_path / "m") == {"a": "2", "README.md": "mine"} and len(os.listdir(tmp_path)) == 2
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"m/a": "2", "m/README.md": "mine"} and os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_a_cleanup_that_fails_hides_no_error_and_makes_none(tmp_path, monkeypatch, number):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "unlink", fails)
    monkeypatch.setattr(fcntl, "flock", fails)
    write(tmp_path / "f")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "f"):
        1 / 0  # noqa: B018
    assert (tmp_path / "f").read_text() == "new"


@pytest.mark.parametrize("name", ["model", "n" * 255])
def test_the_users_files_in_a_killed_writers_folder_go_back_to_a_name_of_any_length(tmp_path, name):
    write_folder(tmp_path / name, a="1")
    (tmp_path / name / "README.md").write_text("mine")

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "settle", killed)  # behind the exchange
        with pytest.raises(KeyboardInterrupt):
            write_folder(tmp_path / name, a="2")
    assert not (tmp_path / name / "README.md").exists()
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {f"{name}/a": "2", f"{name}/README.md": "mine"}


def test_what_is_replaced_keeps_its_permissions(tmp_path):
    write(tmp_path / "f")
    write_folder(tmp_path / "m", a="1")
    for path, mode in (("f", 0o600), ("m", 0o750), ("m/a", 0o640)):
        (tmp_path / path).chmod(mode)
    write(tmp_path / "f", "newer")
    write_folder(tmp_path / "m", a="2", b="2")
    found = {path: stat.S_IMODE((tmp_path / path).stat().st_mode) for path in ("f", "m", "m/a", "m/b")}
    (tmp_path / "plain").touch()
    assert found == {"f": 0o600, "m": 0o750, "m/a": 0o640, "m/b": stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


def test_a_thread_never_takes_the_file_of_the_first_one_for_a_dead_writers(tmp_path):
    """The number of a process's first thread is the process's own, as that of an earlier life can be."""
    failed, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            try:
                write(tmp_path / "f")
            except OSError as error:
                failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(1500):
            write(tmp_path / "f")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed


def test_several_threads_write_one_target(tmp_path):
    failed = []

    def work(text):
        try:
            for number in range(20):
                write(tmp_path / "f", text * 1000)
                write_folder(tmp_path / f"m{number // 5}", a=text, b=text)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(text,)) for text in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sorted(os.listdir(tmp_path)) == ["f", "m0", "m1", "m2", "m3"]
    assert (tmp_path / "f").read_text() in ("x" * 1000, "y" * 1000, "z" * 1000)
    assert len(set(tree(tmp_path / "m0").values())) == 1 and len(tree(tmp_path / "m0")) == 2


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_that_cannot_flush_folders_nor_lock(tmp_path, monkeypatch, number):
    """As some network mounts and FUSE do."""
    real, flushed = os.fsync, []

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flushed.append(descriptor)
        real(descriptor)

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(fcntl, "flock", flock)
    write(tmp_path / "f")
    write_folder(tmp_path / "m", a="1")
    write_folder(tmp_path / "m", a="2")
    assert tree(tmp_path) == {"f": "new", "m/a": "2"} and len(flushed) == 4  # three files and the names
    # Without locks another machine's process cannot be told from a dead one: only what is old goes.
    (tmp_path / f".f.{DEAD}.tmp").write_text("half")
    remove_leftovers(tmp_path)
    assert f".f.{DEAD}.tmp" in os.listdir(tmp_path)


def test_a_disk_that_fails_at_the_flush_keeps_the_old_file(tmp_path, monkeypatch):
    write(tmp_path / "f", "old")

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskError, match="out=f: the disk is full: make room"), disk_errors("out=f"):
        write(tmp_path / "f", "new")
    assert tree(tmp_path) == {"f": "old"}


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OSError(errno.ENOSPC, "No space left"), DiskError, "out=x: the disk is full: MORE"),
        (OSError(errno.EDQUOT, "Quota"), DiskError, "out=x: the quota is used up: MORE"),
        (OSError(errno.EIO, "Input/output error", "x/y"), DiskError, "out=x: x/y: the disk reports an error: MORE"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), UserError, "(permission denied): ELSEWHERE"),
        (OSError(errno.EROFS, "Read-only"), UserError, "(a read-only file system): ELSEWHERE"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n"), UserError, "(the name is too long): ELSEWHERE"),
        (OSError("524288 requested and 0 written"), DiskError, "took only a part"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), DiskError, "out=x: the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), DiskError, "only a part"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), DiskError, "only a part"),
    ],
    ids=str,
)
def test_what_the_disk_says_in_one_line(error, kind, says):
    with pytest.raises(UserError) as raised, disk_errors("out=x", full="MORE", refused="ELSEWHERE"):
        raise error
    assert type(raised.value) is kind and says in str(raised.value) and "\n" not in str(raised.value)
    assert raised.value.status == (1 if kind is DiskError else 2)


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), ValueError("x"), BrokenPipeError(errno.EPIPE, "x"), OSError("x")]
)
def test_what_is_no_disk_error_stays_what_it_is(error):
    with pytest.raises(type(error)) as raised, disk_errors("out=x"):
        raise error
    assert raised.value is error


@needs_dev_full
def test_libraries_on_a_disk_that_is_full(tmp_path):
    import numpy as np
    import torch

    (tmp_path / "full").symlink_to("/dev/full")
    attempts = [
        lambda path: torch.save({"x": torch.zeros(100000)}, path),
        lambda path: np.zeros(100000).tofile(path),
        lambda path: path.write_bytes(bytes(100000)),
    ]
    for attempt in attempts:
        with pytest.raises(DiskError), disk_errors("out=x"):
            attempt(tmp_path / "full")
