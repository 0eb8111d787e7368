"""Sweeps: every job's reason in the table, whatever signs it has; a signal ends them; folders are never shared."""

import csv
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf

from bitnet_lit import cli
from bitnet_lit.config import TrainConfig
from bitnet_lit.errors import DiskError, TrainingStopped, UserError
from bitnet_lit.overrides import as_typed
from bitnet_lit.runs import sweep
from bitnet_lit.runs.folder import check_free
from bitnet_lit.runs.job_folder import State, state
from bitnet_lit.runs.own_folder import make_own, record_name
from bitnet_lit.runs.sweep_table import SweepTable, read_jobs
from tests.support import REPOSITORY, TINY_RUN, run_command, start_command

ODD = "[/b] [red] :smile: \x1b[31m \u2028 \udcff 'a, b' ${x}"


def job_folder(folder, overrides, metrics=None, error=None):
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if error is not None:
        (folder / "error.txt").write_text(error, encoding="utf-8", errors="surrogateescape")


def start_in(folder):
    SweepTable().on_multirun_start(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))


def end_of(folder):
    start_in(folder)
    return SweepTable.end()


def test_reasons_are_text_whatever_signs_they_have(tmp_path, capsys):
    """rich would take [/b] for the end of a style, and raise."""
    job_folder(tmp_path / "0", ["seed=1"], {"val/loss": 1.5})
    job_folder(
        tmp_path / "1", as_typed(TrainConfig, ["seed=2", "data.dir=[/b] ${x}, y"]), error="UserError: [/b] [red]"
    )
    assert end_of(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "[/b] [red]" in printed and "UserError" not in printed and "[/b] ${x}, y" in printed and "1.5000" in printed
    with (tmp_path / "sweep.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[1]["error"] == "UserError: [/b] [red]" and rows[1]["data.dir"] == "[/b] ${x}, y"


def test_a_table_that_cannot_be_written_is_no_success(tmp_path, capsys):
    job_folder(tmp_path / "0", ["seed=1"], {"val/loss": 1.5})
    start_in(tmp_path)
    (tmp_path / "sweep.csv").mkdir()  # a full disk gives an OSError too
    assert SweepTable.end() == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: the table of ") and "1.5000" in printed.out  # shown, where it is not kept


def test_an_error_that_cannot_be_noted_ends_no_sweep(tmp_path, capsys):
    """The disk is full: the job that finds out fails, and the others may need no room."""

    def fail():
        raise DiskError("checkpoints: the disk is full: make room")

    (tmp_path / "0" / "error.txt").mkdir(parents=True)
    assert sweep.run_job(fail, tmp_path / "0", tmp_path, True) == float("inf")
    assert "0: checkpoints: the disk is full: make room" in capsys.readouterr().err


def test_a_job_that_left_nothing_is_named(tmp_path, capsys, monkeypatch):
    job_folder(tmp_path / "0", ["seed=1"], {"val/loss": 1.5})
    SweepTable().on_multirun_start(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    monkeypatch.setattr(SweepTable, "jobs", ["0", "1"])
    assert SweepTable.end() == 1
    printed = capsys.readouterr().err
    assert "1 of 2 jobs of" in printed and "  1: did not finish" in printed


def test_the_table_finds_jobs_whose_folder_is_a_path(tmp_path):
    for number in (0, 2, 10):
        job_folder(tmp_path / "lr" / f"seed-{number}", [f"seed={number}"], {"val/loss": 1.0})
    assert [row["job"] for row in read_jobs(tmp_path)] == ["lr/seed-0", "lr/seed-2", "lr/seed-10"]


def test_what_a_job_raises_is_noted_in_its_folder(tmp_path):
    def fail():
        raise UserError(ODD)

    assert sweep.run_job(fail, tmp_path / "0", tmp_path, True) == float("inf")
    text = (tmp_path / "0" / "error.txt").read_text(encoding="utf-8")
    assert text.startswith("UserError: [/b] [red] :smile:") and text.count("\n") == 1 and "\x1b" not in text


def test_a_job_that_a_signal_stopped_ends_the_sweep(tmp_path, capsys):
    ran = []

    def stopped():
        ran.append(0)
        raise TrainingStopped("SIGTERM at step 1", status=143)

    for number in range(3):
        sweep.run_job(stopped, tmp_path / str(number), tmp_path, True)
        job_folder(tmp_path / str(number), [f"seed={number}"])
    assert ran == [0] and sweep.stop_number(tmp_path) == signal.SIGTERM
    assert [row["error"] for row in read_jobs(tmp_path)] == ["SIGTERM at step 1", "not started", "not started"]
    assert [path.parent.name for path in tmp_path.glob("*/error.txt")] == ["0"]
    assert "error:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "SIGINT at step 11 of 30: saved; go on with python -m bitnet_lit.train resume=s/a",
        "SIGUSR1 before the first step: no step was done",
        "TrainingStopped: SIGTERM at step 3: saved",  # as earlier versions wrote it
        "TrainingStopped: not started: SIGINT ended the sweep",
    ],
)
def test_a_job_that_was_stopped_has_not_failed(tmp_path, line):
    job_folder(tmp_path, ["seed=1"], error=line)
    assert state(tmp_path) is State.NEW
    (tmp_path / "error.txt").write_text(f"UserError: {line}")
    assert state(tmp_path) is State.FAILED


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_signal_before_the_first_step_of_a_job_ends_the_sweep(tmp_path, capsys, is_replaced):
    def work():
        try:
            signal.raise_signal(signal.SIGUSR1)
        finally:
            if is_replaced:
                raise UnboundLocalError("a finally of a library")

    handlers = sweep.StopHandlers(tmp_path)
    handlers.install()
    try:
        result = sweep.run_job(work, tmp_path / "0", tmp_path, True)
    finally:
        handlers.remove()
    assert result == float("inf") and sweep.stop_number(tmp_path) == signal.SIGUSR1
    assert capsys.readouterr().err == f"sweep: {tmp_path}/0: SIGUSR1 before the first step: no step was done\n"
    assert state(tmp_path / "0") is State.NEW


@pytest.mark.parametrize("by_itself", [False, True])
def test_a_signal_reaches_a_job_of_another_process_once(tmp_path, monkeypatch, by_itself):
    """A second one would stop the job without saving."""
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(sweep, "_GRACE_SECONDS", 0.2)
    heard = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))

    def work():
        sweep.request_stop(tmp_path, signal.SIGUSR1)
        if by_itself:
            signal.raise_signal(signal.SIGUSR1)
            time.sleep(1.0)  # in which no second one comes
        for _ in range(600):  # the watching thread may have to wait for a processor
            if heard:
                break
            time.sleep(0.1)

    try:
        sweep.run_job(work, tmp_path / "0", tmp_path, is_main_process=False)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert heard == [signal.SIGUSR1]


def test_nothing_is_written_where_another_run_lies(tmp_path):
    (tmp_path / "0" / "checkpoints").mkdir(parents=True)
    (tmp_path / "0" / "checkpoints" / "last.ckpt").write_text("x")
    assert record_name(str(tmp_path / "0")) is None and record_name(str(tmp_path / "1")) == ".hydra"

    def refuse():
        raise UserError("holds a run already")

    sweep.run_job(refuse, tmp_path / "0", tmp_path, True)
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["checkpoints"]
    assert read_jobs(tmp_path) == [{"job": "0", "error": "UserError: holds a run already"}]


def test_a_run_that_died_before_its_first_checkpoint_is_typed_again_as_another(tmp_path):
    """Its folder is free again: what is recorded, noted and shown is the new run's."""
    (tmp_path / "0" / "checkpoints").mkdir(parents=True)  # made before the first step
    (tmp_path / "0" / "config.yaml").write_text("seed: 1\nrun_dir: x\n")
    assert record_name(str(tmp_path / "0")) == ".hydra"

    def fail():
        raise UserError("no data")

    sweep.run_job(fail, tmp_path / "0", tmp_path, True)
    assert (tmp_path / "0" / "error.txt").read_text() == "UserError: no data\n"
    assert not (tmp_path / ".refused").exists()


def test_a_sweep_that_was_stopped_says_how_each_job_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SweepTable, "flags", ["--config-dir", "mine"])
    job_folder(tmp_path / "0", ["seed=1"], {"val/loss": 1.5})
    job_folder(tmp_path / "1", ["seed=2"], error="TrainingStopped: SIGTERM at step 3: saved")
    (tmp_path / "1" / "checkpoints").mkdir()
    (tmp_path / "1" / "checkpoints" / "last.ckpt").write_text("x")
    (tmp_path / "1" / "config.yaml").write_text(
        "seed: 2\nrun_dir: x\nschemes: [my.Scheme]\noptim: {_target_: torch.optim.SGD}\n"
        "logger: {extra: {mlflow: {_target_: lightning.pytorch.loggers.MLFlowLogger}}}\n"
    )
    started = ["seed=3", "data.dir=a b", "launcher=joblib", "sweep.n_trials=3", "run_dir=/x", "schemes=my.Scheme"]
    job_folder(tmp_path / "2", as_typed(TrainConfig, started))
    sweep.request_stop(tmp_path, signal.SIGTERM)
    SweepTable.handlers = sweep.StopHandlers(tmp_path)
    assert SweepTable.end() == 128 + signal.SIGTERM
    commands = [line.strip() for line in capsys.readouterr().out.splitlines() if "bitnet_lit.train" in line]
    assert all(shlex.split(command)[3:5] == ["--config-dir", "mine"] for command in commands)
    words = [shlex.split(command)[5:] for command in commands]
    # Without allow= the classes that the run names would be refused.
    assert words[0] == [f"resume={tmp_path / '1'}", "allow=[lightning.pytorch.loggers.MLFlowLogger,my.Scheme]"]
    assert words[1] == [
        "seed=3",
        "data.dir=a b",
        "run_dir=/x",
        "schemes=[my.Scheme]",
        f"hydra.run.dir={tmp_path / '2'}",
    ]
    assert " run_dir=/x " in commands[1]  # quoted only where a shell needs it
    check_free(tmp_path / "2", True)  # and its folder is free
    assert len(words) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".hydra/overrides.yaml", b"- seed=2\n- data.d\xff"),
        (".hydra/overrides.yaml", b"- [seed=2"),
        (".hydra/overrides.yaml", b""),
        ("metrics.json", b'{"val/loss": '),
        ("metrics.json", b'{"val/loss": "x"}'),
        ("metrics.json", b"[" * 10**5),
        ("error.txt", b"UserError: \xff\n"),
    ],
)
def test_a_job_whose_files_are_damaged_is_a_row_with_an_error(tmp_path, capsys, name, content):
    job_folder(tmp_path / "0", ["seed=1"], {"val/loss": 1.5})
    job_folder(tmp_path / "1", ["seed=2"])
    (tmp_path / "1" / name).write_bytes(content)
    sweep.request_stop(tmp_path, signal.SIGTERM)
    SweepTable.handlers = sweep.StopHandlers(tmp_path)
    assert SweepTable.end() == 128 + signal.SIGTERM
    with (tmp_path / "sweep.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["val loss"] == "1.5" and not rows[0]["error"] and rows[1]["error"]
    assert not (tmp_path / ".stop").exists() and "Traceback" not in capsys.readouterr().err


def test_default_names_never_collide(tmp_path):
    folder = tmp_path / "2026-01-31" / "12-00-00"
    assert [make_own(folder).name for _ in range(3)] == ["12-00-00", "12-00-00-1", "12-00-00-2"]


def test_two_runs_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    """Through Hydra: the name is a constant here, as it is within a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "CONF_DIR", tmp_path / "conf")
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    text = (tmp_path / "conf" / "train.yaml").read_text()
    text = text.replace("${now:%Y-%m-%d}/${now:%H-%M-%S}", "one/second")
    (tmp_path / "conf" / "train.yaml").write_text(text)
    seen = []
    for _ in range(2):
        cli.run("train", lambda config: seen.append(config.run_dir), [])
    outputs = tmp_path / "outputs" / "one"
    assert seen == [str(outputs / name) for name in ("second", "second-1")]
    assert (outputs / "second-1" / ".hydra" / "config.yaml").is_file()


@pytest.mark.parametrize("several", [[], ["-m", "seed=1,2"]], ids=["run", "sweep"])
@pytest.mark.parametrize("typed", [True, False])
def test_other_ranks_leave_nothing(tmp_path, monkeypatch, several, typed):
    """Started by torchrun beside the first rank: no folder, no record, no note and no table of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    seen = []

    def fail_the_second(config):
        seen.append(config.run_dir)
        if len(seen) == 2:
            raise UserError("as the first rank")

    folder = "hydra.sweep.dir=shared" if several else "hydra.run.dir=shared"
    if several:
        with pytest.raises(TrainingStopped, match="jobs of the sweep failed"):
            cli.run("train", fail_the_second, [*several, *[folder] * typed])
        assert len(seen) == 2
    else:
        cli.run("train", fail_the_second, [folder] * typed)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    # The folder of a sweep is the one that the first rank makes, because its name comes from the overrides.
    assert typed or several or not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["launcher=joblib"]], ids=["one after the other", "side by side"])
def test_sigterm_ends_a_sweep(tmp_path, shards, launcher):
    """To the process that was started alone: the jobs that run save, no other one starts, the table says so."""
    tiny = [item for item in TINY_RUN if not item.startswith(("trainer.max_steps", "trainer.val_check"))]
    long = ["trainer.max_steps=100000", "trainer.val_check_interval=50000"]
    arguments = [*tiny, *long, f"data.dir={shards}", "seed=1,2,3", "hydra.sweep.dir=sweep", *launcher]
    process = subprocess.Popen(
        [sys.executable, "-m", "bitnet_lit.train", "-m", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for _ in range(600):
        if (tmp_path / "sweep" / "seed=1" / "metrics.csv").exists():
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "Traceback" not in printed
    errors = [row["error"] for row in read_jobs(tmp_path / "sweep")]
    assert "SIGTERM at step" in errors[0] or "before the first step" in errors[0]
    assert "not started" in errors[-1] and (tmp_path / "sweep" / "sweep.csv").exists()
    if "SIGTERM at step" in errors[0]:
        assert (tmp_path / "sweep" / "seed=1" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "seeds"), [([], [1, 2]), (["launcher=joblib"], [2])], ids=["in this process", "in a process of joblib"]
)
def test_a_sweep_over_two_processes_a_job(tmp_path, shards, launcher, seeds):
    """The second rank of each job gets the job's overrides and its folder, and the next job ranks of its own."""
    tiny = [item for item in TINY_RUN if not item.startswith("trainer.accelerator")]
    arguments = [*tiny, f"data.dir={shards}", "trainer=ddp_sim", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    sweep_folder = "hydra.sweep.dir=a sweep, of two"
    odd = "callbacks.sample_prompts=['a, b']"
    start = start_command if launcher else run_command
    result = start(
        "train",
        "-m",
        *arguments,
        odd,
        f"seed={','.join(map(str, seeds))}",
        sweep_folder,
        *launcher,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for seed in seeds:
        name = f"seed={seed}" if len(seeds) > 1 else next(path.name for path in tmp_path.glob("a sweep*/*=*"))
        folder = tmp_path / "a sweep, of two" / name
        metrics = json.loads((folder / "metrics.json").read_text())
        # Ranks of different seeds would have drawn different weights, and one of them would have waited for ever.
        assert metrics["seed"] == seed and metrics["tokens"] == 2 * 2 * 4 * 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a sweep, of two"]
    assert not list(tmp_path.rglob(".hydra_resume"))
