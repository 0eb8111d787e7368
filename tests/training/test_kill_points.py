"""A run that dies at a file operation and is resumed leaves what one leaves that was never broken."""

import csv
import itertools
import json
import os
import pathlib
import shutil

import pytest
import torch

from bitnet_lit.cli import compose
from bitnet_lit.errors import TrainingStopped, UserError
from bitnet_lit.training.callbacks.checkpoints import Checkpoints
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN

# The last validation is not the best one, so best.ckpt and last.ckpt differ at the end.
RUN = [
    *TINY_RUN,
    "trainer.max_steps=6",
    "trainer.val_check_interval=2",
    "callbacks.checkpoint_every_n_steps=1",
    "optim=adamw",
    "optim.learning_rate=3",
    "schedule=wsd",
    "schedule.decay_share=0.1",
    "schedule.warmup_steps=2",
]


class Died(BaseException):
    """Stands for a kill: nothing but `finally` blocks runs behind it, as nothing does behind a kill."""


def die_at(monkeypatch, count):
    """Let operation `count` of those that make or change a name end the run; returns the counter of all of them."""
    operations = itertools.count()

    def counted(original):
        def operation(*arguments, **options):
            if next(operations) == count:
                raise Died
            return original(*arguments, **options)

        return operation

    for owner, name in (
        (os, "replace"),
        (os, "rename"),
        (os, "link"),
        (os, "fsync"),
        (os, "truncate"),
        (pathlib.Path, "rename"),
        (pathlib.Path, "mkdir"),
        (pathlib.Path, "write_text"),
        (shutil, "copyfile"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return operations


def without_times(row):
    return {key: value for key, value in row.items() if not key.startswith("perf/")}


def plain(value):
    """A checkpoint without what measures time."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if not str(key).startswith("perf/")}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def contents(folder):
    """Every file of a run folder, times left out."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".ckpt":
            found[name] = plain(torch.load(path, weights_only=True))
        elif name == "metrics.csv":
            with path.open(newline="") as file:
                found[name] = [without_times(row) for row in csv.DictReader(file)]
        elif name == "metrics.json":
            found[name] = without_times(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    train(compose("train", [f"run_dir={folder}", f"data.dir={shards}", *RUN]))
    return contents(folder)


def resume(folder, shards):
    """Type the same again, as a user does, until the run is complete."""
    if not (folder / "checkpoints" / "last.ckpt").exists():
        train(compose("train", [f"run_dir={folder}", f"data.dir={shards}", *RUN]))
    else:
        try:
            train(resume_config(str(folder)))
        except UserError as error:
            assert "complete at step 6" in str(error)


def compare(folder, unbroken, original):
    """`original`: the run folder's path in the unbroken run, which some files hold."""
    left = contents(folder)
    assert left.keys() == unbroken.keys()
    for name, content in unbroken.items():
        if name == "config.yaml":
            content = content.replace(str(original).encode(), str(folder).encode())
        elif name == "metrics.json":
            content = {**content, "run_dir": str(folder)}
        assert left[name] == content, name


POINTS = int(os.environ.get("KILL_POINTS", "3"))


@pytest.mark.slow
def test_dead_at_a_file_operation(tmp_path, tmp_path_factory, shards, unbroken, monkeypatch):
    assert "model_last/model.safetensors" in unbroken
    original = unbroken["metrics.json"]["run_dir"]
    operations = die_at(monkeypatch, -1)
    train(compose("train", [f"run_dir={tmp_path / 'counted'}", f"data.dir={shards}", *RUN]))
    total = next(operations)
    monkeypatch.undo()
    points = range(total) if total <= POINTS else [total - 1 - i * total // POINTS for i in range(POINTS)]
    for point in points:
        folder = tmp_path / str(point)
        die_at(monkeypatch, point)
        with pytest.raises(Died):
            train(compose("train", [f"run_dir={folder}", f"data.dir={shards}", *RUN]))
        monkeypatch.undo()
        resume(folder, shards)
        compare(folder, unbroken, original)


@pytest.mark.slow
def test_asked_to_stop_behind_every_step(tmp_path, shards, monkeypatch):
    """The last step is no multiple of anything: its row and its validation come from the end of the run alone."""
    options = [f"data.dir={shards}", *TINY_RUN, "trainer.max_steps=5", "trainer.val_check_interval=2"]
    options += ["trainer.log_every_n_steps=2", "trainer.accumulate_grad_batches=2"]
    train(compose("train", [f"run_dir={tmp_path}/whole", *options]))
    original, stops = Checkpoints.on_train_batch_end, [1, 2, 3, 4, 5]

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step in stops:
            self.signals.number = 15
        original(self, trainer, *arguments)

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", on_train_batch_end)
    with pytest.raises(TrainingStopped, match="SIGTERM at step 1 of 5"):
        train(compose("train", [f"run_dir={tmp_path}/stopped", *options]))
    for step in (2, 3, 4, 5):
        stops.remove(step - 1)
        with pytest.raises(TrainingStopped, match=f"SIGTERM at step {step} of 5"):
            train(resume_config(str(tmp_path / "stopped")))
    stops.clear()
    train(resume_config(str(tmp_path / "stopped")))
    compare(tmp_path / "stopped", contents(tmp_path / "whole"), tmp_path / "whole")
