"""2N steps straight and N + resume + N: the same weights, bit for bit."""

import csv

import pytest
import torch

from bitnet_lit.cli import compose
from bitnet_lit.errors import UserError
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN, Killed, kill_at


def state(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def metric_rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [
            {key: row[key] for key in ("step", "train/loss", "val/loss", "train/learning_rate")}
            for row in csv.DictReader(file)
            if row["train/loss"] or row["val/loss"]
        ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.num_workers=0"],
        ["data.num_workers=2"],
        ["optim=adamw", "schedule=two_stage", "model.dropout=0.2"],
        ["trainer.accumulate_grad_batches=2", "model.dropout=0.2"],
        ["quant.lambda_warmup_steps=7"],
        ["quant.start_at=0.7", "trainer.accumulate_grad_batches=2"],
        ["optim.normuon=true", "optim.cautious_weight_decay=true", "schedule.weight_decay=to_zero"],
        ["callbacks.checkpoint_every_n_steps=5"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_resumed_equals_unbroken_bit_for_bit(tmp_path, shards, monkeypatch, overrides):
    options = [f"data.dir={shards}", *TINY_RUN, *overrides]
    train(compose("train", [f"run_dir={tmp_path}/whole", *options]))
    kill_at(monkeypatch, 6)  # after the checkpoint of step 4 (or 5), before the validation of step 8
    with pytest.raises(Killed):
        train(compose("train", [f"run_dir={tmp_path}/broken", *options]))
    monkeypatch.undo()
    assert not (tmp_path / "broken" / "metrics.json").exists()
    train(resume_config(str(tmp_path / "broken")))
    whole, resumed = state(tmp_path / "whole"), state(tmp_path / "broken")
    assert whole["global_step"] == resumed["global_step"] == 8
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    assert metric_rows(tmp_path / "whole") == metric_rows(tmp_path / "broken")


def finished(tmp_path, shards):
    train(compose("train", [f"run_dir={tmp_path}/run", f"data.dir={shards}", *TINY_RUN]))
    return str(tmp_path / "run")


def test_a_longer_run_must_say_what_becomes_of_the_curve(tmp_path, shards):
    run = finished(tmp_path, shards)
    with pytest.raises(UserError, match=r"complete at step 8: give a larger trainer.max_steps .*schedule.total_steps"):
        train(resume_config(run))
    with pytest.raises(UserError, match=r"add schedule.total_steps=8 to keep the curve"):
        resume_config(run, ["trainer.max_steps=12"])
    metrics = train(resume_config(run, ["trainer.max_steps=12", "schedule.total_steps=12"]))
    assert metrics["steps"] == 12


def test_refusals(tmp_path, shards):
    run = finished(tmp_path, shards)
    with pytest.raises(UserError, match="no run in it"):
        resume_config(str(tmp_path))
    with pytest.raises(UserError, match="a resumed run keeps its optim"):
        resume_config(run, ["optim=adamw"])
    with pytest.raises(UserError, match=r"a resumed run keeps its mode; override single values .such as trainer.max"):
        resume_config(run, ["mode=smoke"])
    with pytest.raises(UserError, match=r"with init_from=other: it was for the start of the run: leave it out$"):
        resume_config(run, ["init_from=other"])
    assert resume_config(run, ["init_from=null", "init_optimizer=false"]).init_from is None  # as it was
    with pytest.raises(UserError, match=r"resume=.* with model.hidden_size=: .*: leave model.hidden_size= out"):
        resume_config(run, ["model.hidden_size=999"])
    with pytest.raises(UserError, match="nonsense"):
        resume_config(run, ["nonsense=1"])
    for checkpoint in ("last.ckpt", "best.ckpt"):
        (tmp_path / "run" / "checkpoints" / checkpoint).unlink()
    with pytest.raises(UserError, match="no checkpoint in it"):
        resume_config(run)
