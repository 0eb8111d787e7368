"""Whose a run folder is."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bitnet_lit.cli import compose
from bitnet_lit.errors import UserError
from bitnet_lit.runs.folder import check_free, clean, find_run, is_running, is_taken, locked
from bitnet_lit.runs.own_folder import record_name
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN

HOLDER = """
import sys
from pathlib import Path
from bitnet_lit.runs.folder import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path):
    with locked(tmp_path) as is_locked:
        assert is_locked
        with pytest.raises(UserError, match="another process is training in this folder"), locked(tmp_path):
            pass
    with locked(tmp_path):  # free again
        assert not list(tmp_path.iterdir())


def test_who_asks_whether_a_run_is_running_is_not_taken_for_one(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\nrun_dir: x\n")
    asking = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)  # what a report beside holds for an instant
    assert not is_running(tmp_path) and not is_taken(tmp_path)
    ends = threading.Timer(0.1, os.close, [asking])
    ends.start()
    with locked(tmp_path) as is_locked:  # waits for the instant
        assert is_locked and is_running(tmp_path) and is_taken(tmp_path)
    ends.join()


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process"), locked(tmp_path):
        pass
    holder.kill()
    holder.wait(60)
    with locked(tmp_path) as is_locked:
        assert is_locked


@pytest.mark.parametrize("result", ["checkpoints/last.ckpt", "checkpoints/best.ckpt", "model/x", "metrics.json"])
def test_a_folder_with_a_run_is_refused(tmp_path, result):
    (tmp_path / "config.yaml").write_text("seed: 1\nrun_dir: x\n")
    (tmp_path / result).parent.mkdir(exist_ok=True)
    (tmp_path / result).write_text("a result")
    with pytest.raises(UserError, match=f"holds a run already .*resume={tmp_path}"):
        check_free(tmp_path, True)
    assert (tmp_path / result).read_text() == "a result"


def test_what_a_run_without_a_checkpoint_left_makes_room(tmp_path):
    for name in ("metrics.csv", "samples.txt", "ternary_health.csv", "notes.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "config.yaml").write_text("seed: 1\nrun_dir: x\n")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").write_text("x")
    with pytest.raises(UserError, match="holds a run already"):
        check_free(tmp_path, False)  # no locks: it may be alive
    replaced = [path.relative_to(tmp_path).as_posix() for path in check_free(tmp_path, True)]
    events = "tensorboard/events.out.tfevents.1"
    assert replaced == ["metrics.csv", "ternary_health.csv", "samples.txt", events, "config.yaml"]


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "samples.txt",
        "metrics.csv",
        "tensorboard/events.out.tfevents.1",
        "model/x",
        "metrics.json",
    ],
)
def test_files_that_no_run_wrote_stay(tmp_path, name):
    """A folder of the user's own, in which no run ever was."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(UserError, match=f"has a {name.removesuffix('/x')} that no run wrote"):
        check_free(tmp_path, True)
    assert (tmp_path / name).read_text() == "mine\n"


def test_a_pipe_in_the_place_of_a_config_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    assert not is_taken(tmp_path) and not is_running(tmp_path)
    with pytest.raises(UserError, match="has a config.yaml that no run wrote"):
        check_free(tmp_path, True)


def test_a_kill_while_a_dead_run_makes_room_leaves_the_rest_to_the_next(tmp_path):
    for name in ("metrics.csv", "samples.txt", "ternary_health.csv"):
        (tmp_path / name).write_text("x")
    (tmp_path / "config.yaml").write_text("seed: 1\nrun_dir: x\n")
    for _ in range(4):
        check_free(tmp_path, True)[0].unlink()
    assert not list(tmp_path.iterdir())


def test_a_run_is_found_from_wherever_it_is_typed(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1\nrun_dir: x\n")
    (run / "checkpoints" / "best.ckpt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert find_run("run") == (Path("run"), Path("run/checkpoints/last.ckpt"))
    assert find_run("run/checkpoints/best.ckpt") == (Path("run"), Path("run/checkpoints/best.ckpt"))
    monkeypatch.chdir(run / "checkpoints")
    for typed in ("best.ckpt", "./best.ckpt", "../checkpoints/best.ckpt"):
        folder, checkpoint = find_run(typed)
        assert folder.resolve() == run.resolve() and checkpoint.samefile(run / "checkpoints" / "best.ckpt")
    monkeypatch.chdir(run)
    assert find_run("checkpoints/best.ckpt")[0].resolve() == run.resolve()
    for typed in ("config.yaml", "checkpoints", "model"):
        with pytest.raises(UserError, match=f"no run in it .*.the run is {run}"):
            find_run(typed)
    (tmp_path / "best.ckpt").write_text("x")
    for typed, why in (("", "resume= is empty"), ("../best.ckpt", "lies in no checkpoints/"), ("..", "is missing")):
        with pytest.raises(UserError, match=why):
            find_run(typed)
    (run / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(UserError, match="no checkpoint in it"):
        find_run(str(run))


def test_a_run_of_another_user_is_one_line(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1\nrun_dir: x\n")
    (run / "checkpoints" / "last.ckpt").write_text("x")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=f"resume={run}: cannot be written: copy that folder to a place of your own"):
        find_run(str(run))
    monkeypatch.setattr(Path, "exists", refused)
    assert record_name(str(run)) is None
    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(UserError, match=f"resume={run}: cannot be read .Permission denied.: check its permissions"):
        find_run(str(run))


@pytest.mark.parametrize("typed", ["last", "latest", "true", "outputs", "outputs/checkpoints/best.ckpt"])
def test_a_resume_that_names_no_run_is_told_the_newest(tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="give the folder that train wrote, or start again without resume$"):
        find_run(typed)
    for number, name in enumerate(("2", "3", "1")):
        last = tmp_path / "outputs" / "2026-01-31" / name / "checkpoints" / "last.ckpt"
        last.parent.mkdir(parents=True)
        last.write_text("x")
        os.utime(last, (number, number))
    with pytest.raises(UserError, match=r"train wrote \(the newest is outputs/2026-01-31/1\), or start again"):
        find_run(typed)


def test_a_folder_is_taken_by_results_and_by_who_trains_there(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert not is_taken(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 1\nrun_dir: x\n")
    assert not is_taken(tmp_path)  # it died before its first checkpoint: `check_free` takes it too
    with locked(tmp_path):
        assert is_taken(tmp_path)
    (tmp_path / "checkpoints" / "last.ckpt").write_text("x")
    assert is_taken(tmp_path)


def test_a_mount_without_locks(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path) as is_locked:
        assert not is_locked
    assert not is_taken(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 1\nrun_dir: x\n")
    assert is_taken(tmp_path)  # whoever began it may be alive


def test_leftovers_of_killed_processes_go(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    number = dead.stdout.strip()
    for name in (f".metrics.csv.{number}.tmp", f"checkpoints/.last.ckpt.{number}.tmp", "checkpoints/.best.ckpt.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / "error.txt").write_text("of the user's own: no job ran here")
    clean(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "error.txt"]
    (tmp_path / ".hydra").mkdir()
    clean(tmp_path)  # of a job that failed and runs again
    assert not (tmp_path / "error.txt").exists()


def test_a_new_run_never_writes_into_another(tmp_path, shards):
    command = [f"run_dir={tmp_path / 'run'}", f"data.dir={shards}", *TINY_RUN, "trainer.max_steps=2"]
    train(compose("train", command))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds a run already"):
        train(compose("train", [*command, "model.hidden_size=64"]))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another process is training"):
        train(resume_config(str(tmp_path / "run"), ["trainer.max_steps=3", "schedule.total_steps=3"]))
