"""Open slots: callbacks, loggers, optimizers, schedules and Trainer flags of a user's own."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch.optim.lr_scheduler import LinearLR

from bitnet_lit import cli
from bitnet_lit.errors import UserError
from bitnet_lit.training.callbacks.checkpoints import Checkpoints
from bitnet_lit.training.checkpoint_file import read_checkpoint
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN, Killed, kill_at

HERE = "tests.training.test_slots"
QUICK = ["callbacks.sample_prompts=[]", "callbacks.throughput=false", "callbacks.progress_bar=false"]
BAR = ["callbacks.progress_bar=true"]
EARLY = [
    "callbacks.extra.early._target_=lightning.pytorch.callbacks.EarlyStopping",
    "callbacks.extra.early.monitor=val/loss",
]


class Count(Callback):
    """Counts batches; its state goes into checkpoints."""

    def __init__(self, stop_at=None, note=None):
        self.batches, self.stop_at, self.note = 0, stop_at, note

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        if self.batches == self.stop_at:
            trainer.should_stop = True

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state_dict):
        self.batches = state_dict["batches"]


class Keeps(Callback):
    def state_dict(self):
        return {"path": Path("x")}


class Lines(Logger):
    """Writes a line for each row."""

    name, version = "lines", 0

    def __init__(self, path):
        super().__init__()
        self.path = Path(path)

    def log_hyperparams(self, params, *arguments, **options):
        self.path.write_text(json.dumps(params["optim"]) + "\n")

    def log_metrics(self, metrics, step=None):
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def halving(step, every=2):
    return 0.5 ** (step // every)


class Fading:
    def __init__(self, total_steps, power=1.0):
        self.total_steps, self.power = total_steps, power

    def __call__(self, step):
        return (1 - step / self.total_steps) ** self.power


def compose(*overrides):
    return cli.compose("train", ["run_dir=unused", *overrides])


def run(folder, shards, *overrides):
    return train(compose(f"run_dir={folder}", f"data.dir={shards}", *TINY_RUN, *QUICK, *overrides))


def weights(folder):
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]


def assert_same(one, other):
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name


def test_a_slot_takes_keys_with_and_without_a_plus_and_groups_stay_typed():
    for sign in ("", "+", "++"):
        overrides = [f"{sign}callbacks.extra.early.{item}" for item in ("_target_=a.B", "patience=3")]
        assert compose(*overrides).callbacks.extra == {"early": {"_target_": "a.B", "patience": 3}}
    config = compose("optim._target_=torch.optim.SGD", "optim.momentum=0.9", "optim.learning_rate=1e-1")
    assert (config.optim.name, config.optim.learning_rate, config.optim.arguments) == ("SGD", 0.1, {"momentum": 0.9})
    config = compose("schedule._target_=a.b", "schedule.every=${seed}", "seed=7")
    assert config.schedule.arguments == {"every": 7}
    with pytest.raises(UserError, match=r"optim.lr: is called optim.learning_rate here"):
        compose("optim._target_=torch.optim.SGD", "optim.lr=1")
    with pytest.raises(UserError, match=r"optim._target_=\?\?\?: give a value"):
        compose("optim=custom")
    with pytest.raises(UserError, match=r"unknown key 'optim.nesterof': did you mean 'optim.nesterov'"):
        compose("optim.nesterof=1")
    with pytest.raises(UserError, match=r"callbacks.extra.early.monitor=\?\?\?: give a value"):
        compose("+callbacks.extra.early={_target_: a.B, monitor: ???}")


@pytest.fixture(scope="module")
def own(tmp_path_factory, shards):
    """A run with something in every slot, and the same one killed behind its checkpoint of step 4."""
    root = tmp_path_factory.mktemp("own")
    overrides = [
        f"+callbacks.extra.count._target_={HERE}.Count",
        "callbacks.extra.count.note._target_=builtins.dict",
        "callbacks.extra.count.note._partial_=true",
        f"logger.extra.lines._target_={HERE}.Lines",
        "logger.extra.lines.path=${run_dir}.txt",
        "optim._target_=torch.optim.SGD",
        "optim.momentum=0.9",
        "optim.weight_decay=0.1",
        "optim.learning_rate=0.1",
        f"schedule._target_={HERE}.Fading",
        "schedule.power=2",
        "trainer.extra.profiler=simple",
    ]
    run(root / "whole", shards, *overrides)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 6)
        with pytest.raises(Killed):
            run(root / "broken", shards, *overrides)
    return root


def test_every_slot_is_used_and_a_resumed_run_is_the_unbroken_one(own, tmp_path):
    shutil.copytree(own / "broken", tmp_path / "broken")
    foreign = r"config.yaml: names the class tests\.training\.test_slots\.Fading, .*resume=.* 'allow=\["
    with pytest.raises(UserError, match=foreign) as refused:
        resume_config(str(tmp_path / "broken"))
    allow = shlex.split(str(refused.value))[-1]  # what the line says is what is typed
    with pytest.raises(UserError, match="builtins.dict"):
        resume_config(str(tmp_path / "broken"), ["allow=[tests]"])
    train(resume_config(str(tmp_path / "broken"), [allow]))
    assert_same(own / "whole", tmp_path / "broken")
    states = [
        read_checkpoint(folder / "checkpoints" / "last.ckpt")["callbacks"]["Count"]
        for folder in (own / "whole", tmp_path / "broken")
    ]
    assert states == [{"batches": 8}] * 2
    rows = (own / "whole.txt").read_text().splitlines()
    assert json.loads(rows[0])["momentum"] == 0.9 and any("val/loss" in json.loads(row) for row in rows)
    with (own / "whole" / "metrics.csv").open() as file:
        header, *lines = [line.strip().split(",") for line in file]
    column = header.index("train/learning_rate")
    rates = [float(line[column]) for line in lines if line[column]]
    assert rates == pytest.approx([0.1 * (1 - step / 8) ** 2 for step in range(8)])
    groups = read_checkpoint(own / "whole" / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert [(group["momentum"], group["weight_decay"]) for group in groups] == [(0.9, 0.1), (0.9, 0.0)]
    saved = yaml.safe_load((own / "whole" / "config.yaml").read_text())
    assert saved["optim"] == {
        "_target_": "torch.optim.SGD",
        "learning_rate": 0.1,
        "weight_decay": 0.1,
        "momentum": 0.9,
    }


@pytest.mark.parametrize(
    "schedule",
    [
        ["schedule._target_=torch.optim.lr_scheduler.OneCycleLR", "schedule.max_lr=1e-2"],
        [f"schedule._target_={HERE}.halving", "schedule.every=3"],
    ],
    ids=["a scheduler of PyTorch, which is given total_steps", "a function"],
)
def test_schedules_resume_exactly(tmp_path, shards, monkeypatch, schedule):
    overrides = ["optim=adamw", *schedule]
    run(tmp_path / "whole", shards, *overrides)
    kill_at(monkeypatch, 6)
    with pytest.raises(Killed):
        run(tmp_path / "broken", shards, *overrides)
    monkeypatch.undo()
    train(resume_config(str(tmp_path / "broken"), ["allow=[tests]"]))
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_early_stopping_ends_a_run_and_everything_says_so(tmp_path, shards, monkeypatch):
    """It decides in a validation of a part of the split; the last one takes all, whatever ended the run."""
    overrides = [*EARLY, "callbacks.extra.early.min_delta=100", "callbacks.extra.early.patience=1"]
    overrides += ["trainer.max_steps=40", "trainer.val_check_interval=2"]
    metrics = run(tmp_path / "run", shards, *overrides)
    assert metrics["steps"] == 4 and json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 4
    from bitnet_lit.config import EvaluateConfig
    from bitnet_lit.inference.evaluation import evaluate

    folder = tmp_path / "run" / ("model_last" if (tmp_path / "run" / "model_last").exists() else "model")
    figures = evaluate(EvaluateConfig(checkpoint=str(folder), data_dir=str(shards), accelerator="cpu"))
    assert figures["loss"] == pytest.approx(metrics["val/loss"], rel=1e-5)
    with pytest.raises(UserError, match=r"complete: a callback ended it at step 4 of 40.*callbacks.extra.early"):
        train(resume_config(str(tmp_path / "run")))

    # Killed between the checkpoint and the end: the resumed run ends where it would have ended.
    def on_train_epoch_end(self, trainer, pl_module):
        raise Killed

    monkeypatch.setattr(Checkpoints, "on_train_epoch_end", on_train_epoch_end)
    with pytest.raises(Killed):
        run(tmp_path / "broken", shards, *overrides)
    monkeypatch.undo()
    again = train(resume_config(str(tmp_path / "broken")))
    for key in ("steps", "val/loss", "val/best_loss", "train/loss"):
        assert again[key] == metrics[key], key
    on = ["callbacks.extra.early=null", "trainer.max_steps=6", "schedule.total_steps=40"]
    assert train(resume_config(str(tmp_path / "run"), on))["steps"] == 6


def test_a_callback_that_stops_within_a_step_ends_behind_it(tmp_path, shards):
    options = ["trainer.accumulate_grad_batches=2", f"callbacks.extra.count._target_={HERE}.Count"]
    metrics = run(tmp_path / "run", shards, *options, "callbacks.extra.count.stop_at=3")
    assert metrics["steps"] == 2
    progress = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["loops"]["fit_loop"]
    assert progress["epoch_loop.batch_progress"]["current"]["ready"] == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["callbacks.extra.a.b=1"], r"callbacks.extra.a=.*: names no class: give callbacks.extra.a._target_="),
        (["callbacks.extra.a._target_=nowhere.B"], r"extra.a._target_=nowhere.B: cannot be imported .*No module"),
        (
            ["callbacks.extra.a._target_=lightning.pytorch.callbacks.EarlyStoping"],
            r"cannot be imported .*: did you mean lightning.pytorch.callbacks.EarlyStopping\?",
        ),
        ([f"schedule._target_={HERE}.havling"], rf"cannot be imported .*: did you mean {HERE}.halving\?"),
        ([*EARLY, "callbacks.extra.early.patence=1"], r"callbacks.extra.early: .* did you mean patience\?"),
        (
            [EARLY[0], "callbacks.extra.early.monitor=val_loss"],
            r"monitor=val_loss is not logged: give one of .*val/loss",
        ),
        (["callbacks.extra.a._target_=lightning.pytorch.callbacks.RichProgressBar", *BAR], "progress_bar=false"),
        (["callbacks.extra.a._target_=builtins.dict"], "callbacks.extra.a: dict is no callback"),
        (
            [
                "callbacks.extra.a._target_=lightning.pytorch.callbacks.StochasticWeightAveraging",
                "callbacks.extra.a.swa_lrs=0.01",
            ],
            "averages latent weights",
        ),
        (["callbacks.extra.a._target_=lightning.pytorch.callbacks.ModelCheckpoint"], "would write checkpoints"),
        ([f"callbacks.extra.a._target_={HERE}.Keeps"], r"state_dict of Keeps holds a pathlib"),
        (["logger.extra.a._target_=lightning.pytorch.loggers.MLFlowLogger"], "logger.extra.a: .*install -U 'mlflow"),
        (["optim._target_=torch.optim.SGD", "optim.momentun=1"], r"optim: torch.optim.SGD .* did you mean momentum\?"),
        (
            ["experiment=demo", "optim._target_=torch.optim.SGD"],
            r"optim.adamw_learning_rate=0.016: torch.optim.SGD has no such argument: .* ~optim.adamw_learning_rate",
        ),
        (["optim._target_=torch.optim.Rprop", "optim.weight_decay=1"], "optim.weight_decay=1.*Rprop has none"),
        (["optim._target_=torch.nn.Identity"], "is no optimizer"),
        (["schedule._target_=torch.optim.lr_scheduler.ReduceLROnPlateau"], "take a schedule that follows the step"),
        (["schedule._target_=builtins.str"], r"cannot be called with a step \(TypeError"),
        ([f"schedule._target_={HERE}.halving", "schedule.warmup_steps=1"], "halving has no argument warmup_steps"),
        (["trainer.extra.max_epochs=3"], r"trainer.extra.max_epochs=3: has a key of its own: trainer.max_epochs="),
        (["trainer.extra.enable_checkpointing=true"], "last.ckpt and best.ckpt are always written"),
        (["trainer.extra.fast_dev_run=true"], "trainer.extra.fast_dev_run=True: mode=smoke"),
        (["trainer.extra.profilr=simple"], "no such flag: did you mean profiler"),
    ],
    ids=lambda value: value[0][:60] if isinstance(value, list) else "",
)
def test_what_cannot_be_made_is_one_line(tmp_path, shards, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / "run", shards, *overrides)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_a_progress_bar_of_lightning_takes_the_place_of_ours(tmp_path, shards, capsys):
    bar = "callbacks.extra.bar._target_=lightning.pytorch.callbacks.TQDMProgressBar"
    assert run(tmp_path / "run", shards, bar, "trainer.max_steps=2")["steps"] == 2  # callbacks.progress_bar=false
    printed = capsys.readouterr()
    assert "it/s" in printed.out + printed.err


def test_a_scheduler_of_pytorch_keeps_its_class(tmp_path, shards):
    from bitnet_lit.config import CustomSchedule
    from bitnet_lit.training.schedule import build_schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], lr=1.0)
    made = build_schedule(optimizer, CustomSchedule("torch.optim.lr_scheduler.LinearLR", {"total_iters": 4}), 0, 10)
    assert type(made) is LinearLR and made.total_iters == 4


def test_lengths_in_epochs_and_shares(tmp_path, shards):
    from bitnet_lit.training.plan import make_plan

    def plan(*overrides):
        config = compose("model.vocab_size=512", "data.batch_size=4", "trainer.accelerator=cpu", *overrides)
        return make_plan(config, 32, 42)

    assert plan("trainer.max_epochs=3").steps == 32  # 42 sequences in steps of 4: 10.5 an epoch
    assert plan("trainer.max_epochs=0.5").steps == 6
    assert plan("trainer.val_check_interval=1.0").validation_steps == 10
    assert plan("trainer.val_check_interval=0.5").validation_steps == 5
    assert plan("trainer.val_check_interval=1").validation_steps == 1
    for wrong in ("trainer.val_check_interval=1.5", "trainer.limit_val_batches=0", "trainer.limit_val_batches=0.0"):
        with pytest.raises(UserError, match=r"trainer\.\w+=.*must be"):
            plan(wrong)
    with pytest.raises(UserError, match="give one of them"):
        plan("trainer.max_epochs=1", "trainer.max_tokens=5")
