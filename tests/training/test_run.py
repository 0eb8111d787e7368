"""train(config): what a run leaves, that figures agree, options, refusals."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from bitnet_lit.cli import compose
from bitnet_lit.config import EvaluateConfig
from bitnet_lit.errors import TrainingStopped, UserError
from bitnet_lit.inference.evaluation import evaluate
from bitnet_lit.training.callbacks.checkpoints import Checkpoints
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN


def run(tmp_path, shards, *overrides, name="run"):
    config = compose("train", [f"run_dir={tmp_path / name}", f"data.dir={shards}", *TINY_RUN, *overrides])
    return train(config)


def rows(tmp_path, name="run"):
    with (tmp_path / name / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(tmp_path, name, folder="model_last"):
    path = tmp_path / name / folder
    if not path.exists():
        path = tmp_path / name / "model"
    return load_file(path / "model.safetensors")


def test_a_run_leaves_everything_and_evaluate_gives_its_last_value(tmp_path, shards, capsys):
    metrics = run(tmp_path, shards)
    *_, done, model, following = capsys.readouterr().err.splitlines()
    assert done.split() == [
        *("done", "step", "8,", "val/loss", f"{metrics['val/loss']:.4f}"),
        *("on", "the", "whole", "validation", "split,"),
        *(f"{metrics['val/bits_per_byte']:.4f}", "bits", "per", "byte"),
    ]
    assert model.split() == ["model", str(tmp_path / "run" / "model")]
    assert (
        following == f"next        python -m bitnet_lit.infer checkpoint={tmp_path / 'run'} 'prompt=Once upon a time'"
    )
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left >= {"config.yaml", "metrics.csv", "metrics.json", "checkpoints", "model", "samples.txt"}
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert metrics["steps"] == 8 and metrics["tokens"] == 8 * 4 * 32
    evaluated = evaluate(EvaluateConfig(checkpoint=str(tmp_path / "run"), accelerator="cpu"))
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["bitnet_lit"]["info"]["metrics"]
    for name in ("loss", "perplexity", "accuracy", "bits_per_byte"):
        # the same sums over the same sequences; batches of 4 there, of 32 here
        assert evaluated[name] == pytest.approx(saved[f"val/{name}"], rel=1e-5)
    # Eight steps of a rate that only falls: the last model is the best one.
    assert metrics["val/loss"] == pytest.approx(evaluated["loss"], rel=1e-5)
    logged = rows(tmp_path)
    assert metrics["val/best_loss"] == pytest.approx(float(logged[-1]["val/loss"]), rel=1e-8)  # 9 digits
    assert metrics["val/best_loss"] != pytest.approx(metrics["val/loss"], rel=1e-4)  # over another part of the split
    assert [int(row["step"]) for row in logged if row["train/loss"]] == list(range(1, 9))
    assert sum(bool(row["val/loss"]) for row in logged) == 2
    for column in ("train/grad_norm", "train/learning_rate", "perf/tokens_per_s", "perf/mfu", "ternary/zero"):
        assert any(row[column] for row in logged), column
    health = (tmp_path / "run" / "ternary_health.csv").read_text().splitlines()
    assert len(health) == 1 + 2 * 14


def test_the_best_model_is_chosen_by_losses_over_the_same_batches(tmp_path, shards):
    """The weights do not move, so no step is better than another. Losses over a part and over all batches differ."""
    still = ["optim.learning_rate=1e-12", "optim.adamw_learning_rate=1e-12", "trainer.limit_val_batches=1"]
    metrics = run(tmp_path, shards, *still, "trainer.val_check_interval=2")
    *before, last = [float(row["val/loss"]) for row in rows(tmp_path) if row["val/loss"]]
    assert len(before) == 3 and before == pytest.approx([last] * 3, rel=1e-6)
    assert metrics["val/best_loss"] == pytest.approx(min(*before, last), rel=1e-8)
    whole = evaluate(EvaluateConfig(checkpoint=str(tmp_path / "run"), accelerator="cpu"))["loss"]
    assert metrics["val/loss"] == pytest.approx(whole, rel=1e-5)
    assert metrics["val/loss"] != pytest.approx(last, rel=1e-4)
    logged = [row["val_whole_split/loss"] for row in rows(tmp_path) if row["val/loss"]]
    assert logged[:3] == [""] * 3 and metrics["val/loss"] == pytest.approx(float(logged[3]), rel=1e-8)  # 9 digits


@pytest.mark.parametrize(("limit", "other"), [("null", "100000"), ("100000", "1.0"), ("1.0", "null")])
def test_a_part_that_is_the_whole_split_is_no_part(tmp_path, shards, capsys, limit, other):
    metrics = run(tmp_path, shards, f"trainer.limit_val_batches={limit}")
    assert metrics["val/loss"] == metrics["val/best_loss"]
    assert metrics["val/loss"] == pytest.approx(float(rows(tmp_path)[-1]["val/loss"]), rel=1e-8)
    info = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["bitnet_lit"]["info"]
    assert "validated on" not in info["recipe"]
    longer = ["trainer.max_steps=9", "schedule.total_steps=8", f"trainer.limit_val_batches={other}"]
    train(resume_config(str(tmp_path / "run"), longer))
    assert "the best model is chosen anew" not in capsys.readouterr().err


def test_a_split_is_not_validated_again_where_a_callback_ends_the_run(tmp_path, shards, monkeypatch):
    """The validation in which EarlyStopping ended the run took the whole split, as each of them."""
    validated, original = [], Checkpoints.on_validation_end

    def noted(self, trainer, pl_module):
        validated.append(trainer.global_step)
        original(self, trainer, pl_module)

    monkeypatch.setattr(Checkpoints, "on_validation_end", noted)
    early = ["callbacks.extra.early._target_=lightning.pytorch.callbacks.EarlyStopping"]
    early += ["callbacks.extra.early.monitor=val/loss", "callbacks.extra.early.stopping_threshold=100"]
    assert run(tmp_path, shards, *early, "trainer.limit_val_batches=100000")["steps"] == 4
    assert validated == [4]


def test_the_loss_falls_and_one_batch_is_learned_by_heart(tmp_path, shards):
    wide = ["model.hidden_size=128", "model.intermediate_size=256", "trainer.max_steps=200"]
    assert run(tmp_path, shards, "mode=overfit", "trainer.val_check_interval=200", *wide)["train/loss"] < 0.1


@pytest.fixture(scope="module")
def default_weights(tmp_path_factory, shards):
    """Weights that TINY_RUN ends with where no option is changed."""
    folder = tmp_path_factory.mktemp("default")
    run(folder, shards)
    return weights(folder, "run")


def trained_weights(tmp_path, shards, overrides):
    """Weights that a run ends with, once it is sure that it learned: an untrained model has log(512) = 6.24 nats."""
    assert run(tmp_path, shards, *overrides)["val/loss"] < 6.2
    return weights(tmp_path, "run")


@pytest.mark.parametrize(
    "overrides",
    [
        ["quant=b1"],
        ["quant=none"],
        ["quant.weight_scale=absmedian"],
        ["quant.lambda_warmup_steps=4"],
        ["quant.activation_bits=4"],
        ["optim=adamw", "schedule=two_stage"],
        ["schedule=wsd", "trainer.max_tokens=1000"],
        ["trainer.precision=bf16-mixed"],
        ["model.dropout=0.1"],
        ["model.sub_norm=false", "model.hidden_act=relu2"],
        ["model.num_key_value_heads=1"],
        ["model.tie_word_embeddings=false"],
        ["trainer.accumulate_grad_batches=2"],
        ["trainer.gradient_clip_val=0.01"],
        ["data.sequence_length=16"],
    ],
    ids=" ".join,
)
def test_an_option_changes_what_is_trained(tmp_path, shards, default_weights, overrides):
    found = trained_weights(tmp_path, shards, overrides)
    is_equal = {name: torch.equal(found[name], tensor) for name, tensor in default_weights.items() if name in found}
    assert len(is_equal) > 10 and not all(is_equal.values())


@pytest.mark.parametrize(
    "overrides",
    [["model.gradient_checkpointing=true"], ["callbacks.checkpoint_every_n_steps=3", "data.num_workers=1"]],
    ids=" ".join,
)
def test_an_option_that_must_not_change_what_is_trained(tmp_path, shards, default_weights, overrides):
    found = trained_weights(tmp_path, shards, overrides)
    assert found.keys() == default_weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in default_weights.items())


def test_the_last_validation_takes_max_val_sequences(tmp_path, shards, capsys):
    """They are the whole split then, of which other validations take a part."""
    few = run(tmp_path, shards, "data.max_val_sequences=6", "trainer.limit_val_batches=1", name="part")
    capsys.readouterr()
    whole = run(tmp_path, shards, "data.max_val_sequences=6", "trainer.limit_val_batches=null", name="whole")
    assert few["val/loss"] == whole["val/loss"] and few["val/best_loss"] != whole["val/best_loss"]
    assert "on at most 6 validation sequences" in capsys.readouterr().err
    assert run(tmp_path, shards, name="all")["val/loss"] != few["val/loss"]
    with pytest.raises(UserError, match="data.max_val_sequences was 6 when the run began, and is 5 now"):
        train(resume_config(str(tmp_path / "part"), ["data.max_val_sequences=5"]))


def test_an_epoch_is_a_pass_over_the_sequences_that_are_trained_on(tmp_path, shards):
    options = ["data.max_train_sequences=8", "trainer.max_epochs=1.5", "trainer.val_check_interval=1.0"]
    metrics = run(tmp_path, shards, *options)
    assert metrics["steps"] == 3  # of 4 sequences
    assert [row["step"] for row in rows(tmp_path) if row["val/loss"]] == ["2", "3"]


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ("[lm_heed]", r"quant\.skip=\[lm_heed\]: no linear layer of that name: did you mean lm_head\?"),
        ("[lm_head,q_porj]", r"quant\.skip=\[q_porj\]: .*did you mean q_proj\?"),
        ("[experts]", r"quant\.skip=\[experts\]: .*there are down_proj, gate_proj, "),
    ],
)
def test_a_layer_to_skip_that_does_not_exist_is_refused(tmp_path, shards, skip, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, shards, f"quant.skip={skip}")


def test_accumulation_equals_the_larger_batch(tmp_path, shards):
    options = ["trainer.max_steps=3", "trainer.gradient_clip_val=0", "quant=none", "optim=adamw"]
    a = run(tmp_path, shards, *options, "data.batch_size=8", name="a")
    b = run(tmp_path, shards, *options, "data.batch_size=4", "trainer.accumulate_grad_batches=2", name="b")
    assert a["tokens"] == b["tokens"]
    # AdamW divides by the root of a tiny second moment: float rounding of gradients comes through at first
    assert a["val/loss"] == pytest.approx(b["val/loss"], rel=1e-4)


def test_init_from_starts_where_the_other_run_ended(tmp_path, shards):
    run(tmp_path, shards, name="a")
    before = load_file(tmp_path / "a" / "model" / "model.safetensors")
    config = compose(
        "train",
        [
            f"run_dir={tmp_path}/b",
            f"data.dir={shards}",
            *TINY_RUN,
            f"init_from={tmp_path}/a",
            "trainer.max_steps=1",
            "optim.learning_rate=1e-12",
            "optim.adamw_learning_rate=1e-12",
            "quant=b1",
        ],
    )
    train(config)
    after = weights(tmp_path, "b")
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_layer(tmp_path, shards, monkeypatch):
    from bitnet_lit.model.layers import DecoderLayer

    forward = DecoderLayer.forward
    calls = []

    def poisoned(self, *arguments):
        calls.append(1)
        y = forward(self, *arguments)
        return y * float("nan") if self.training and len(calls) > 24 else y

    monkeypatch.setattr(DecoderLayer, "forward", poisoned)
    with pytest.raises(TrainingStopped, match=r"step \d+: the (output|gradient) of \S+ is not finite.*last checkpoint"):
        run(tmp_path, shards, "trainer.max_steps=40", "trainer.val_check_interval=2")
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.dir=/nowhere"], "no such folder"),
        (["data.sequence_length=33"], "longer than model.max_position_embeddings"),
        (["model.vocab_size=100"], "leave model.vocab_size at null"),
        (["schedule.warmup_steps=100"], "longer than the run"),
        (["trainer.devices=[]"], "give a number, a list of indices, or auto"),
        (["trainer.num_nodes=2"], "nothing says where the nodes are"),
        (["init_from=/nowhere"], "no such file or folder"),
    ],
    ids=str,
)
def test_refused_before_the_first_step(tmp_path, shards, overrides, message, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)  # a run over two processes leaves it in the process of the tests
    with pytest.raises(UserError, match=message):
        run(tmp_path, shards, *overrides)
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there(tmp_path, shards):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UserError, match=r"^trainer.accelerator=gpu: .* Take trainer.accelerator=auto"):
        run(tmp_path, shards, "trainer.accelerator=gpu")


def test_profile_leaves_a_trace_and_a_table(tmp_path, shards, capsys):
    run(
        tmp_path,
        shards,
        "mode=profile",
        "quant.kernel=reference",
        "trainer.max_steps=8",
        "trainer.val_check_interval=8",
    )
    assert json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())["traceEvents"]
    assert "BitLinearFunction" in (tmp_path / "run" / "profile" / "table.txt").read_text()


def test_wandb_and_tensorboard_offline(tmp_path, shards, monkeypatch):
    import wandb

    warned = []
    monkeypatch.setattr(wandb, "termwarn", lambda text, **_: warned.append(text))
    run(tmp_path, shards, "logger=many", "trainer.max_steps=2", name="a")
    run(tmp_path, shards, "logger=many", "trainer.max_steps=2", name="b")
    for name in ("a", "b"):
        assert len(list((tmp_path / name / "wandb").glob("offline-run-*"))) == 1
        assert list((tmp_path / name / "tensorboard").glob("events.*"))
    assert not [text for text in warned if "anonymous" in text]
