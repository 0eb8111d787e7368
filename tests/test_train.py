"""The folders that `train` is given on the command line: what is no run's is refused, and nothing is left of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_lit import cli
from bitnet_lit.errors import DiskError, UserError
from bitnet_lit.train import _configure, _place
from tests.support import needs_dev_full


def run(*arguments):
    cli.run("train", lambda config: pytest.fail("nothing is wrong"), arguments, defaults=_place, configure=_configure)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hydra.run.dir="], "hydra.run.dir= is empty: give a folder"),
        (["-m", "hydra.sweep.dir=", "seed=1,2"], "hydra.sweep.dir= is empty"),
        (["run_dir="], "run_dir= is empty"),
        (["hydra.run.dir=notes.md"], "the run folder: notes.md: cannot be written .*give another one"),
        (["hydra.run.dir=notes.md/run"], "the run folder: notes.md.*: cannot be written .*give another one"),
        (["-m", "hydra.sweep.dir=notes.md", "seed=1,2"], "the run folder: notes.md: cannot be written"),
        (["resume="], "resume= is empty"),
        (["resume=nowhere"], "resume=nowhere: no such folder: give the folder that train wrote, or"),
        (["resume=best.ckpt"], "no run in it .it lies in no checkpoints/"),
        (["resume=nowhere/best.ckpt"], "no run in it .it lies in no checkpoints/"),
        (["resume=data"], "no run in it"),
        (["resume=."], "no run in it"),
        (["resume=run/config.yaml"], "no run in it .*.the run is .*run"),
        (["resume=run"], "no checkpoint in it"),
        (["-m", "resume=run,data"], "resume=.*run.*data.* in a sweep .-m.: go on with one run at a time"),
        (["-m", "resume=run", "seed=1,2"], "resume=run in a sweep"),
    ],
)
def test_a_folder_that_is_none_of_a_run_is_refused(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\nrun_dir: run\n")
    (tmp_path / "best.ckpt").write_text("x")
    (tmp_path / "notes.md").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(*arguments)
    assert sorted(tmp_path.rglob("*")) == before


@needs_dev_full
@pytest.mark.parametrize("arguments", [["hydra.run.dir=run"], ["-m", "hydra.sweep.dir=run", "seed=1,2"]], ids=str)
def test_a_disk_that_is_full_before_the_run_begins_is_named(tmp_path, monkeypatch, arguments):
    """Hydra writes its record of the command first."""
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    for record in (".hydra/config.yaml", "multirun.yaml"):
        (tmp_path / "run" / record).symlink_to("/dev/full")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DiskError, match="^the run folder: the disk is full: make room, and give the same command again$"
    ):
        run(*arguments)


def test_a_run_that_is_refused_leaves_no_folder_of_its_own(tmp_path, monkeypatch):
    """A folder that was typed stays, and so do the runs of the same day."""
    monkeypatch.chdir(tmp_path)

    def refuse(config):
        if (tmp_path / "kept").exists():
            (Path(config.run_dir) / "notes.md").write_text("mine")
        raise UserError("no data")

    def start(*arguments):
        with pytest.raises(UserError, match="no data"):
            cli.run("train", refuse, arguments, defaults=_place, configure=_configure)
        return [path.relative_to(tmp_path) for path in (tmp_path / "outputs").rglob("*") if path.is_dir()]

    assert start() == []
    assert start("hydra.run.dir=outputs/mine") == [Path("outputs/mine"), Path("outputs/mine/.hydra")]
    (tmp_path / "kept").touch()
    assert len(start()) == 5  # the day, the run that has a file, and its record
    (tmp_path / "kept").unlink()
    assert len(start()) == 5


def test_a_variable_in_the_name_of_a_folder_is_not_read(tmp_path, monkeypatch):
    """The folder may be somebody else's."""
    monkeypatch.setenv("SECRET", "swordfish")
    run_folder = tmp_path / "${oc.env:SECRET}" / "run"
    (run_folder / "checkpoints").mkdir(parents=True)
    (run_folder / "config.yaml").write_text("seed: 1\nrun_dir: run\n")
    (run_folder / "checkpoints" / "last.ckpt").write_text("x")
    monkeypatch.chdir(tmp_path)
    for arguments in (["resume=${oc.env:SECRET}/run"], ["run_dir=${oc.env:SECRET}/run"]):
        with pytest.raises(UserError, match=r"Hydra would read the \$\{ in this path as its own") as refused:
            run(*arguments)
        assert "swordfish" not in str(refused.value)
    monkeypatch.chdir(run_folder)
    for arguments in (["resume=."], []):
        with pytest.raises(UserError, match="Hydra would read"):
            run(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["${oc.env:SECRET}"]


def test_run_dir_is_hydras_folder_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    cli.run("train", lambda config: seen.append(config.run_dir), ["run_dir=my, run"], defaults=_place)
    assert seen == ["my, run"] and (tmp_path / "my, run" / ".hydra" / "config.yaml").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["my, run"]


def test_hydras_own_config_is_printed(tmp_path):
    """It holds an interpolation of ours."""
    command = [sys.executable, "-m", "bitnet_lit.train", "--cfg", "all", "--resolve"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert "output_subdir: .hydra" in printed.stdout
    assert not list(tmp_path.iterdir())
