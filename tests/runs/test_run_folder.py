"""Whose a run folder is."""

import errno
import fcntl
import subprocess
import sys

import pytest

from bitnet_lit.cli import compose
from bitnet_lit.errors import UserError
from bitnet_lit.runs.folder import claim, clean, locked
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
    (tmp_path / result).parent.mkdir(exist_ok=True)
    (tmp_path / result).write_text("a result")
    with pytest.raises(UserError, match=f"holds a run already .*resume={tmp_path}"):
        claim(tmp_path, True)
    assert (tmp_path / result).read_text() == "a result"


def test_what_a_run_without_a_checkpoint_left_makes_room(tmp_path):
    for name in ("metrics.csv", "samples.txt", "ternary_health.csv", "notes.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "config.yaml").write_text("seed: 1\nrun_dir: x\n")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").write_text("x")
    with pytest.raises(UserError, match="holds a run already"):
        claim(tmp_path, False)  # no locks: it may be alive
    claim(tmp_path, True)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.md", "tensorboard"}


def test_a_config_of_something_else_stays(tmp_path):
    (tmp_path / "config.yaml").write_text("site: mine\n")
    with pytest.raises(UserError, match="a config.yaml that is not of a run"):
        claim(tmp_path, True)
    assert (tmp_path / "config.yaml").read_text() == "site: mine\n"


def test_a_mount_without_locks(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path) as is_locked:
        assert not is_locked


def test_leftovers_of_killed_processes_go(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    number = dead.stdout.strip()
    for name in (f".metrics.csv.{number}.tmp", f"checkpoints/.last.ckpt.{number}.tmp", "checkpoints/.best.ckpt.tmp"):
        (tmp_path / name).write_text("half")
    clean(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints"]


def test_a_new_run_never_writes_into_another(tmp_path, shards):
    command = [f"run_dir={tmp_path / 'run'}", f"data.dir={shards}", *TINY_RUN, "trainer.max_steps=2"]
    train(compose("train", command))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds a run already"):
        train(compose("train", [*command, "model.hidden_size=64"]))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another process is training"):
        train(resume_config(str(tmp_path / "run"), ["trainer.max_steps=3", "schedule.total_steps=3"]))
