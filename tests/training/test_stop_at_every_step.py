"""A run that is asked to stop behind each of its steps, and resumed, leaves what one leaves that was never broken."""

import csv
import json

import pytest
import torch

from bitnet_lit.cli import compose
from bitnet_lit.errors import TrainingStopped
from bitnet_lit.training.callbacks.checkpoints import Checkpoints
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN


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
