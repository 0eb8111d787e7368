"""Rows of steps: each under its own step, however late its figures arrive from the device."""

import csv

import pytest
import torch

from bitnet_lit.cli import compose
from bitnet_lit.training.callbacks import step_log
from bitnet_lit.training.figures import Moment, StepFigures
from bitnet_lit.training.run import train
from tests.support import TINY_RUN


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in found]


@pytest.fixture(scope="module")
def options(shards):
    return [f"data.dir={shards}", *TINY_RUN, "trainer.max_steps=7", "trainer.log_every_n_steps=2", "callbacks=quiet"]


def test_figures_that_arrive_late_are_written_under_their_own_step(tmp_path, options, monkeypatch):
    train(compose("train", [f"run_dir={tmp_path}/at_once", *options]))
    monkeypatch.setattr(Moment, "is_reached", lambda self: False)
    metrics = train(compose("train", [f"run_dir={tmp_path}/late", *options]))
    written = rows(tmp_path / "late")
    assert written == rows(tmp_path / "at_once")
    assert [row["step"] for row in written if row["train/loss"]] == ["2", "4", "6", "7"]
    assert float(written[-2]["train/loss"]) == pytest.approx(metrics["train/loss"], rel=1e-6)


def test_an_error_ends_the_run_and_the_rows_before_it_are_written(tmp_path, options, monkeypatch):
    from bitnet_lit.training.callbacks.checkpoints import Checkpoints

    def stop(self, trainer, *arguments):
        if trainer.global_step == 3:
            raise ZeroDivisionError

    monkeypatch.setattr(Moment, "is_reached", lambda self: False)
    monkeypatch.setattr(Checkpoints, "on_train_batch_end", stop)
    with pytest.raises(ZeroDivisionError):
        train(compose("train", [f"run_dir={tmp_path}/run", *options]))
    assert [row["step"] for row in rows(tmp_path / "run")] == ["2"]


def test_an_error_of_one_rank_does_not_wait_for_the_others(tmp_path, options, monkeypatch):
    """The figures say that an earlier step was not finite, for which the ranks would meet."""
    from bitnet_lit.training.callbacks.checkpoints import Checkpoints

    def stop(self, trainer, *arguments):
        if trainer.global_step == 3:
            raise ZeroDivisionError

    met = []
    monkeypatch.setattr(step_log.StepLog, "_found_inf", staticmethod(lambda module: {"found_inf": torch.tensor(1.0)}))
    monkeypatch.setattr(step_log.BitNetModule, "check_finite", lambda module: met.append(module))
    monkeypatch.setattr(Moment, "is_reached", lambda self: False)
    monkeypatch.setattr(Checkpoints, "on_train_batch_end", stop)
    with pytest.raises(ZeroDivisionError):
        train(compose("train", [f"run_dir={tmp_path}/run", *options]))
    assert met == [] and rows(tmp_path / "run") == []


def test_a_run_that_logs_rarely_is_still_checked(tmp_path, options, monkeypatch):
    taken = []

    class Noted(StepFigures):
        def __init__(self, step, figures, device):
            taken.append((step, sorted(figures)))
            super().__init__(step, figures, device)

    # On a CPU every step is checked before it is done, and nothing is kept for later.
    monkeypatch.setattr(step_log.StepLog, "_found_inf", staticmethod(lambda module: {"found_inf": torch.tensor(0.0)}))
    monkeypatch.setattr(step_log, "StepFigures", Noted)
    monkeypatch.setattr(step_log, "CHECK_STEPS", 3)
    rare = ["trainer.log_every_n_steps=100", "trainer.max_steps=5", "callbacks.throughput=false"]
    train(compose("train", [f"run_dir={tmp_path}/run", *options, *rare]))
    names = ["found_inf", "train/grad_norm", "train/learning_rate", "train/loss"]
    assert taken == [(3, ["found_inf"]), (5, names)]
    assert [row["step"] for row in rows(tmp_path / "run") if row["train/loss"]] == ["5"]


def test_numbers_tensors_and_functions_become_numbers():
    figures = StepFigures(3, {"a": 1.5, "b": torch.tensor(2.5), "c": lambda: 3.5}, torch.device("cpu"))
    assert figures.has_arrived() and figures.read() == {"a": 1.5, "b": 2.5, "c": 3.5}
    assert StepFigures(3, {}, torch.device("cpu")).read() == {}
