"""The commands on a GPU: what a run leaves, evaluation, export and text, kill and resume, two GPUs against one."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import bitnet_lit
from bitnet_lit.cli import compose
from bitnet_lit.config import EvaluateConfig, ExportConfig
from bitnet_lit.errors import TrainingStopped
from bitnet_lit.exports.write import export
from bitnet_lit.inference.evaluation import evaluate
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN, Killed, kill_at, start_command

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]  # compiling takes most of the time

ON_GPU = [*(item for item in TINY_RUN if not item.startswith("trainer.accelerator")), "trainer.accelerator=gpu"]


def run(folder, shards, *overrides):
    return train(compose("train", [f"run_dir={folder}", f"data.dir={shards}", *ON_GPU, *overrides]))


def last_state(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_weights(one, other):
    ours, theirs = last_state(one), last_state(other)
    assert ours["global_step"] == theirs["global_step"]
    different = [
        name for name, tensor in ours["state_dict"].items() if not torch.equal(tensor, theirs["state_dict"][name])
    ]
    assert not different


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards):
    """A run with nothing set but the accelerator and its tiny sizes, and its figures."""
    folder = tmp_path_factory.mktemp("gpu") / "run"
    torch.cuda.reset_peak_memory_stats()
    metrics = run(folder, shards, "trainer.max_steps=40", "trainer.val_check_interval=20")
    return folder, metrics, torch.cuda.max_memory_allocated()


def test_one_word_trains_on_the_gpu(trained):
    folder, metrics, peak_bytes = trained
    assert peak_bytes > 2**20
    assert metrics["steps"] == 40 and metrics["val/loss"] < 5.9  # log(512) = 6.24 nats before the first step
    assert len([row for row in rows(folder) if row["train/loss"]]) == 40
    assert any(row["perf/tokens_per_s"] for row in rows(folder))
    saved = json.loads((folder / "model" / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "bitnet"


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_each_name_of_the_gpu_means_it(tmp_path, shards, capsys, accelerator):
    run(tmp_path / "run", shards, f"trainer.accelerator={accelerator}", "compile=false", "trainer.max_steps=1")
    device = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("device"))
    assert "1 x cuda" in device
    assert ("bf16-mixed" in device) is (torch.cuda.get_device_capability() >= (8, 0))


def test_evaluate_gives_the_loss_of_the_run_on_both_devices(trained):
    """In training the activations are bfloat16 outside of the sums: 2^-9 of each value, which averages out."""
    folder, metrics, _ = trained
    losses = {
        name: evaluate(EvaluateConfig(checkpoint=str(folder), accelerator=name))["loss"] for name in ("gpu", "cpu")
    }
    assert losses["gpu"] == pytest.approx(losses["cpu"], rel=1e-3)
    assert metrics["val/loss"] == pytest.approx(losses["cpu"], rel=5e-3)


def test_its_model_is_exported_and_tells_a_story_on_both_devices(trained, tmp_path):
    folder, _, _ = trained
    export(ExportConfig(checkpoint=str(folder), format="packed", out=str(tmp_path / "packed")))
    for path in (folder, tmp_path / "packed"):
        for device in ("cuda", "cpu"):
            text = bitnet_lit.load(path, device=device).generate("Once", max_new_tokens=8, temperature=0)
            assert text.startswith("Once") and len(text) > len("Once")


# Attention's backward pass adds its parts in the order in which they are done, which is another one in each run.
# trainer.deterministic=true adds them in a fixed order.
@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dropout=0.2"],
        ["compile=false", "optim=adamw", "trainer.accumulate_grad_batches=2"],
        ["compile=false", "quant=none"],
    ],
    ids=" ".join,
)
def test_resumed_equals_unbroken_bit_for_bit(tmp_path, shards, monkeypatch, overrides):
    options = ["trainer.deterministic=true", *overrides]
    run(tmp_path / "whole", shards, *options)
    kill_at(monkeypatch, 6)  # after the checkpoint of step 4, before the validation of step 8
    with pytest.raises(Killed):
        run(tmp_path / "broken", shards, *options)
    monkeypatch.undo()
    train(resume_config(str(tmp_path / "broken")))
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")


def test_a_killed_command_goes_on(tmp_path, shards):
    """SIGKILL at any moment of a run, and the checkpoint before it is whole."""
    options = [
        f"data.dir={shards}",
        *ON_GPU,
        "callbacks=quiet",
        "compile=false",
        "trainer.max_steps=4000",
        "trainer.val_check_interval=50",
    ]
    command = [sys.executable, "-m", "bitnet_lit.train", *options, "hydra.run.dir=run"]
    process = subprocess.Popen(command, cwd=tmp_path)
    try:
        while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None, "the run ended before its first checkpoint"
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    step = last_state(tmp_path / "run")["global_step"]
    steps = step + 20
    start_command("train", "resume=run", f"trainer.max_steps={steps}", f"schedule.total_steps={steps}", cwd=tmp_path)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert step % 50 == 0 and metrics["steps"] == steps and metrics["val/loss"] < 6.2


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_step_that_is_not_finite_is_named_and_changes_no_weight(tmp_path, shards, monkeypatch, optim):
    """The host learns of it some steps later, but the optimizer has skipped every step from it on."""
    from bitnet_lit.model.layers import MLP

    forward, calls = MLP.forward, []

    def poisoned(self, *arguments):
        calls.append(self.training)
        y = forward(self, *arguments)
        return y * float("nan") if self.training and sum(calls) > 2 * 12 else y  # two layers, twelve good steps

    monkeypatch.setattr(MLP, "forward", poisoned)
    late = ["compile=false", "trainer.max_steps=60", "trainer.log_every_n_steps=50", "trainer.val_check_interval=30"]
    late.append("cuda_graph=false")  # a recorded step does not come by here again
    with pytest.raises(TrainingStopped, match=r"step 12: the (output|gradient) of \S+ is not finite"):
        run(tmp_path / "bad", shards, *late, f"optim={optim}", "callbacks.checkpoint_every_n_steps=10")
    assert len(calls) >= 2 * 20, "it was found at once: the host has waited for a step"
    monkeypatch.undo()
    whole = last_state(tmp_path / "bad")
    assert whole["global_step"] == 10 and all(tensor.isfinite().all() for tensor in whole["state_dict"].values())


def test_a_run_of_the_gpu_goes_on_on_a_cpu_and_back(tmp_path, shards):
    run(tmp_path / "run", shards, "compile=false")
    for steps, accelerator in ((12, "cpu"), (16, "gpu")):
        longer = [f"trainer.max_steps={steps}", f"schedule.total_steps={steps}", f"trainer.accelerator={accelerator}"]
        assert train(resume_config(str(tmp_path / "run"), longer))["steps"] == steps


@pytest.mark.parametrize(
    "options",
    [["trainer.strategy=ddp"], ["trainer.strategy=fsdp"], ["trainer.strategy=fsdp", "optim=adamw"]],
    ids=" ".join,
)
@pytest.mark.gpu(count=2)
def test_two_gpus_train_as_one_does(tmp_path, shards, options):
    """The samples of each step are the same, so the losses are the same but for the order of sums."""
    tiny = [f"data.dir={shards}", *ON_GPU, "callbacks=quiet", "compile=false", "trainer.precision=32-true", *options]
    one = [*tiny, "trainer.strategy=auto", "data.batch_size=8", "hydra.run.dir=one"]
    start_command("train", *one, cwd=tmp_path)
    two = start_command("train", *tiny, "trainer.devices=2", "data.batch_size=4", "hydra.run.dir=two", cwd=tmp_path)
    assert "was killed" not in two.stderr  # both close NCCL together, which waits for the other rank
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0]["tokens"] == metrics[1]["tokens"]
    assert metrics[1]["val/loss"] == pytest.approx(metrics[0]["val/loss"], rel=2e-3)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    longer = ["trainer.max_steps=10", "schedule.total_steps=10", "trainer.devices=1", "trainer.strategy=auto"]
    assert train(resume_config(str(tmp_path / "two"), longer))["steps"] == 10
