"""A sweep that is started again skips what is done, goes on with what is half done, and tries again what failed.

The task is a stand-in that writes the files of a run, so each start takes as long as Hydra takes.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from bitnet_lit import cli, train
from bitnet_lit.errors import UserError
from bitnet_lit.runs.folder import locked
from bitnet_lit.runs.grid import combinations
from bitnet_lit.runs.job import ResumableTask
from bitnet_lit.runs.job_folder import State, state
from bitnet_lit.runs.metric_names import metric_names
from bitnet_lit.runs.sweep_table import read_jobs
from tests.runs.stand_in import StandIn
from tests.support import REPOSITORY, TINY_RUN, Killed, kill_at, run_command


class Task(StandIn):
    """Stands for training: notes what it is asked to do, and leaves what a run leaves."""

    def __init__(self, fails=()):
        super().__init__()
        self.fails = set(fails)

    def __call__(self, config):
        folder = Path(config.run_dir)
        self.ran.append((config.quant.name, config.seed))
        if (config.quant.name, config.seed) in self.fails:
            raise UserError("as the test wants it")
        (folder / "config.yaml").write_text(f"seed: {config.seed}\nrun_dir: {folder}\n")
        (folder / "metrics.json").write_text(json.dumps({"val/loss": config.seed + 0.5}))
        return config.seed + 0.5


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Task()


PAIR = ["-m", "mode=smoke", "quant=b158,none"]
ONE = ["-m", "mode=smoke", "quant=b158"]


def only_sweep(tmp_path):
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    return folder


def test_the_same_line_again_runs_what_is_missing(sweep, tmp_path, capsys):
    line = ["mode=smoke", "quant=b158,none", "seed=1,2"]
    sweep.fails = {("none", 2)}
    assert sweep.start("-m", *line) == 1
    assert sweep.ran == [("b158", 1), ("b158", 2), ("none", 1), ("none", 2)]
    errors = capsys.readouterr().err
    assert "1 of 4 jobs of" in errors and "  quant=none__seed=2: as the test wants it" in errors
    folder = only_sweep(tmp_path)
    assert state(folder / "quant=none__seed=2") is State.FAILED
    # A job that was killed: its checkpoint is there, its figures are not. Another one was deleted by hand.
    shutil.rmtree(folder / "quant=none__seed=1")
    half = folder / "quant=b158__seed=2"
    (half / "metrics.json").unlink()
    (half / "checkpoints").mkdir()
    (half / "checkpoints" / "last.ckpt").write_text("x")
    sweep.fails = set()
    assert sweep.start("-m", "seed=2,1", "quant=none,b158", "mode=smoke") == 0  # another order
    assert sweep.ran == [("none", 2), ("b158", 2), ("none", 1)] and sweep.resumed == ["quant=b158__seed=2"]
    assert "4 jobs, 1 done, 1 half done, 1 failed, 1 new" in capsys.readouterr().err
    assert sweep.start("-m", *line) == 0 and not sweep.ran  # nothing is left
    more = ["-m", "mode=smoke", "quant=b158", "seed=1,2,3", f"hydra.sweep.dir={folder}"]
    assert sweep.start(*more) == 0 and sweep.ran == [("b158", 3)]  # more values
    assert len(read_jobs(folder)) == 5


def test_another_fixed_key_is_another_sweep_or_refused(sweep, tmp_path):
    assert sweep.start(*ONE) == 0 and sweep.ran == [("b158", 1)]
    assert sweep.start(*ONE, "seed=2") == 0 and sweep.ran == [("b158", 2)]
    assert len(list((tmp_path / "outputs" / "sweeps").iterdir())) == 2
    assert sweep.start(*PAIR, "hydra.sweep.dir=mine") == 0 and len(sweep.ran) == 2
    with pytest.raises(UserError, match=r"mine/quant=b158: holds another job \(without seed, and this one is seed=2\)"):
        sweep.start(*PAIR, "hydra.sweep.dir=mine", "seed=2")
    # A key that now has several values: the job of the one value is known by its overrides, whatever its name.
    assert sweep.start(*ONE, "seed=1,2", "hydra.sweep.dir=mine") == 0 and len(sweep.ran) == 2
    assert sweep.start(*ONE, "seed=1,3", "hydra.sweep.dir=mine") == 0 and sweep.ran == [("b158", 3)]


def test_results_of_an_earlier_default_are_not_taken_over(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "CONF_DIR", tmp_path / "conf")
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    assert sweep.start(*ONE) == 0
    with (tmp_path / "conf" / "quant" / "b158.yaml").open("a") as file:
        file.write("skip: []\n")
    with pytest.raises(UserError, match=r"quant=b158: began with quant.skip=\['lm_head'\], and .* \[\] now"):
        sweep.start(*ONE)
    assert not sweep.ran


def test_folders_of_earlier_versions_go_on(sweep, tmp_path):
    """They were numbered."""
    assert sweep.start(*PAIR, "hydra.sweep.dir=mine") == 0
    for number, folder in enumerate(sorted((tmp_path / "mine").glob("quant=*"))):
        record = folder / ".hydra" / "config.yaml"
        text = record.read_text()  # they recorded the default of every scheme
        assert "activation_bits: null" in text
        record.write_text(text.replace("activation_bits: null", "activation_bits: 8"))
        folder.rename(folder.with_name(str(number)))
    (tmp_path / "mine" / "1" / "metrics.json").unlink()
    assert sweep.start(*PAIR, "hydra.sweep.dir=mine") == 0
    assert sweep.ran == [("none", 1)]
    assert sorted(path.name for path in (tmp_path / "mine").iterdir() if path.is_dir()) == ["0", "1"]


def test_a_mistake_in_every_job_ends_the_sweep_before_it_begins(sweep, tmp_path):
    with pytest.raises(UserError, match=r"data.batch_size=0: must be"):
        sweep.start(*PAIR, "data.batch_size=0")
    assert not sweep.ran and not list(tmp_path.rglob("sweeps/*"))
    with pytest.raises(UserError, match=r"optim.learning_rate=interval\(1,2\): a grid takes values"):
        sweep.start(*PAIR, "optim.learning_rate=interval(1,2)")
    sweep.fails = {("b158", 1)}
    assert sweep.start(*ONE) == 2  # known only when the jobs ran


def test_one_process_at_a_time(sweep, tmp_path):
    (tmp_path / "mine").mkdir()
    with (
        locked(tmp_path / "mine"),
        pytest.raises(UserError, match=r"mine: another process runs a sweep in this folder"),
    ):
        sweep.start(*ONE, "hydra.sweep.dir=mine")
    assert sweep.start(*ONE, "hydra.sweep.dir=mine") == 0


def test_a_table_that_no_sweep_wrote_is_not_replaced(sweep, tmp_path):
    (tmp_path / "mine").mkdir()
    table = tmp_path / "mine" / "sweep.csv"
    table.write_text("lr,loss\n1,2\n")
    line = [*ONE, "hydra.sweep.dir=mine"]
    with pytest.raises(UserError, match=r"sweep.csv: is there already, and no sweep wrote it: give another folder"):
        sweep.start(*line)
    assert not sweep.ran and table.read_text() == "lr,loss\n1,2\n"
    table.unlink()
    assert sweep.start(*line) == 0
    assert sweep.start(*line) == 0  # its own is replaced
    assert table.read_text().startswith("job,")


def test_a_job_of_another_process_is_left_alone(sweep, tmp_path, capsys):
    assert sweep.start(*PAIR, "hydra.sweep.dir=mine") == 0
    job = tmp_path / "mine" / "quant=b158"
    for name in ("quant=b158", "quant=none"):
        (tmp_path / "mine" / name / "metrics.json").unlink()
    capsys.readouterr()
    with locked(job):
        assert state(job) is State.RUNNING
        assert sweep.start(*PAIR, "hydra.sweep.dir=mine") == 1
    assert sweep.ran == [("none", 1)] and not (job / "error.txt").exists()
    printed = capsys.readouterr().err
    assert "2 jobs, 1 running, 1 new" in printed and "quant=b158: runs in another process: left alone" in printed
    assert "1 of 2 jobs of mine run in other processes (quant=b158): give the same line again" in printed.replace(
        str(tmp_path) + "/", ""
    )
    assert "failed" not in printed
    assert {row["job"]: row.get("error") for row in read_jobs(tmp_path / "mine")} == {
        "quant=b158": "did not finish",  # it has ended now
        "quant=none": None,
    }
    assert sweep.start(*PAIR, "hydra.sweep.dir=mine") == 0 and sweep.ran == [("b158", 1)]


def test_a_name_of_the_users_own_is_kept(sweep, tmp_path):
    own = [*ONE, "hydra.sweep.dir=mine", "hydra.sweep.subdir=${quant.name}/${seed}"]
    assert sweep.start(*own) == 0
    assert [p.parent.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("metrics.json")] == ["mine/b158/1"]
    assert sweep.start(*own) == 0 and not sweep.ran


def test_a_value_typed_twice_is_one_job():
    typed = OverridesParser.create().parse_overrides(["mode=smoke", "seed=1,1,2,1"])
    assert combinations(typed) == [["mode=smoke", "seed=1"], ["mode=smoke", "seed=2"]]


@pytest.mark.parametrize("typed", ["sweep=lr", "launcher=joblib"])
def test_a_sweep_needs_its_flag(sweep, tmp_path, typed):
    with pytest.raises(UserError, match=f"^{typed} without -m would train one run: add -m$"):
        sweep.start("mode=smoke", typed)
    assert not sweep.ran and not list(tmp_path.iterdir())


@pytest.mark.parametrize("several", [True, False])
def test_a_dry_run_writes_nothing(sweep, tmp_path, several):
    assert sweep.start(*(PAIR if several else PAIR[1:2]), "sweep.dry_run=true") == 0
    assert not sweep.ran and not list(tmp_path.iterdir())
    states = [found for _, _, found, _ in sweep.shown]
    assert states == [State.NEW] * (2 if several else 1)
    assert all(config.seed in (1, 2) for *_, config in sweep.shown)


def arguments_of(shards):
    return ["-m", *TINY_RUN, f"data.dir={shards}", "callbacks=quiet"]


def start_training(*arguments):
    resumable = ResumableTask(train._resume, train._preview)
    cli.run("train", train._train, arguments, defaults=train._place, configure=train._configure, resumable=resumable)


def figures(folder):
    """What a run computed, without how fast and where."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if not key.startswith("perf/") and key != "run_dir"}


def test_a_job_that_was_killed_ends_as_if_it_had_not_been(tmp_path, monkeypatch, shards, capsys):
    """A real run: the second start resumes it, and its curve is that of an uninterrupted one."""
    monkeypatch.chdir(tmp_path)
    arguments = [*arguments_of(shards), "callbacks.checkpoint_every_n_steps=1", "seed=1,2"]
    start_training(*arguments, "hydra.sweep.dir=whole")
    kill_at(monkeypatch, 6)
    with pytest.raises(Killed):
        start_training(*arguments, "hydra.sweep.dir=killed")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert state(tmp_path / "killed" / "seed=1") is State.HALF_DONE
    capsys.readouterr()
    start_training(*arguments, "hydra.sweep.dir=killed", "sweep.dry_run=true")
    shown = capsys.readouterr().out
    assert "half done" in shown and "6 of 8" in shown and "2 jobs (1 half done, 1 new)" in shown
    start_training(*arguments, "hydra.sweep.dir=killed")
    for seed in (1, 2):
        whole, killed = (figures(tmp_path / name / f"seed={seed}") for name in ("whole", "killed"))
        assert whole == killed
    written = json.loads((tmp_path / "whole" / "seed=1" / "metrics.json").read_text())
    numbers = {name for name, value in written.items() if type(value) in (int, float)} - {"seed"}
    assert numbers <= {*metric_names()}  # what a search may ask for

    with pytest.raises(UserError, match="complete at step 8"):
        start_training(f"resume={tmp_path}/whole/seed=1", "sweep.dry_run=true")


def test_a_dry_run_checks_what_a_run_checks(tmp_path, monkeypatch, shards, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [*arguments_of(shards), "seed=1,2", "sweep.dry_run=true"]
    start_training(*arguments)
    shown = capsys.readouterr().out
    assert "2,048 tokens left" in shown and "from the speed of a matrix product" in shown
    for wrong, words in [
        ("data.dir=nothing", "data.dir=nothing: no such folder"),
        ("model.vocab_size=8", "model.vocab_size=8, but the data"),
        ("schedule.warmup_steps=9", "longer than the run"),
        ("quant.skip=[nothing]", "quant.skip"),
        ("model.hidden_size=4000000", "parameters, and training it takes"),
    ]:
        with pytest.raises(UserError, match=words):
            start_training(*arguments, wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_sigkill_in_a_sweep(tmp_path, shards):
    """The process dies in its second job, and the same line ends the sweep; the first job is not touched again."""
    arguments = [*arguments_of(shards), "trainer.max_steps=60", "callbacks.checkpoint_every_n_steps=1", "seed=1,2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bitnet_lit.train", *arguments, "hydra.sweep.dir=s"], cwd=tmp_path
    )
    second = tmp_path / "s" / "seed=2"
    deadline = time.monotonic() + 120
    while not (second / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state(tmp_path / "s" / "seed=1") is State.DONE and state(second) is State.HALF_DONE
    before = (tmp_path / "s" / "seed=1" / "metrics.json").stat().st_mtime_ns
    again = run_command("train", *arguments, "hydra.sweep.dir=s", cwd=tmp_path)
    assert "2 jobs, 1 done, 1 half done" in again.stderr
    assert state(second) is State.DONE and json.loads((second / "metrics.json").read_text())["steps"] == 60
    assert (tmp_path / "s" / "seed=1" / "metrics.json").stat().st_mtime_ns == before
    assert OmegaConf.load(second / "config.yaml").seed == 2
