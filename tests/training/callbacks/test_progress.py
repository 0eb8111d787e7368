"""What the progress bar says while a run trains and validates, in a terminal and in a log file."""

import io
import re
from types import SimpleNamespace

import pytest

from bitnet_lit.config import DataConfig, ModelConfig, MuonConfig, ScheduleConfig, TrainConfig, TrainerConfig
from bitnet_lit.terminal import PlainConsole
from bitnet_lit.training.callbacks import progress
from bitnet_lit.training.callbacks.step_log import StepLog
from bitnet_lit.training.plan import make_plan


def bar_and_trainer(monkeypatch, terminal, steps, val_check_interval=None):
    """A bar that writes to `terminal`, and a trainer for its hooks."""
    monkeypatch.setattr(progress, "console", lambda stderr: terminal)
    config = TrainConfig(
        model=ModelConfig(vocab_size=512),
        data=DataConfig(batch_size=8),
        optim=MuonConfig(),
        schedule=ScheduleConfig(),
        trainer=TrainerConfig(accelerator="cpu", max_steps=steps, val_check_interval=val_check_interval),
    )
    trainer = SimpleNamespace(
        global_step=0,
        is_global_zero=True,
        log_every_n_steps=10,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])],
        callback_metrics={"val/loss": 2.0},
    )
    return progress.RichBar(make_plan(config, 64, 1000, validation_sequences=(4, 12)), StepLog()), trainer


@pytest.mark.parametrize(("width", "missing"), [(120, []), (80, ["lr"]), (60, ["lr", "tokens/s"])])
def test_a_narrow_terminal_shows_the_steps_and_the_time_left(monkeypatch, width, missing):
    shown, now = io.StringIO(), 0.0
    terminal = PlainConsole(file=shown, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now))
    bar, trainer = bar_and_trainer(monkeypatch, terminal, steps=3600)
    bar.step_log.last["train/loss"] = 3.25
    bar.on_train_start(trainer, None)
    bar.on_validation_end(trainer, None)
    trainer.global_step, now = 10, 2.0
    bar.on_train_batch_end(trainer, None, None, None, 9)
    bar._progress.refresh()
    line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).replace("\r", "\n").splitlines()[-1]
    bar.on_train_end(trainer, None)
    assert "  10/3600" in line and "loss 3.250  val 2.000" in line and line.rstrip().endswith("left")
    assert len(line.rstrip()) <= width and "\N{HORIZONTAL ELLIPSIS}" not in line
    assert [text for text in ("lr", "tokens/s") if text not in line] == missing


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "log"])
def test_the_time_left_counts_validations_and_the_bar_says_that_it_validates(monkeypatch, is_terminal):
    """20 steps of a second each, validations of 240 seconds and 60 of sample texts after every fifth step.

    The one at the end has three times the batches, and no more sample texts.
    """
    shown, now = io.StringIO(), 0.0
    terminal = PlainConsole(file=shown, force_terminal=is_terminal, width=120)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now))
    bar, trainer = bar_and_trainer(monkeypatch, terminal, steps=20, val_check_interval=5)

    def lines():
        if is_terminal:
            bar._progress.refresh()
        return shown.getvalue()

    bar.on_train_start(trainer, None)
    for step in range(1, 11):
        trainer.global_step, now = step, now + 1
        bar.on_train_batch_end(trainer, None, None, None, step)
        if is_terminal:
            assert f"{step}/20" in lines()  # each step, not each tenth
        if step == 5:
            bar.on_validation_start(trainer, None)
            assert ("validating" in lines()) is is_terminal
            now += 240
            bar.on_validation_epoch_end(trainer, None)
            now += 60
            bar.on_validation_end(trainer, None)
    assert "val 2.000" in lines() and "18 min left" in lines()  # 10 seconds of steps, 240 + 60, and 720 + 60 at the end
    bar.on_train_end(trainer, None)
