"""A run that is killed, stopped or interrupted, in a process of its own, and then resumed."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.support import TINY_RUN, run_command

RUN = ["trainer.max_steps=60", "trainer.val_check_interval=10", "callbacks.checkpoint_every_n_steps=3"]


def arguments(shards, name):
    return [f"data.dir={shards}", *TINY_RUN, *RUN, f"hydra.run.dir=outputs/{name}"]


def start(cwd, shards, name):
    command = [sys.executable, "-m", "bitnet_lit.train", *arguments(shards, name)]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoint = cwd / "outputs" / name / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    return process


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, shards):
    cwd = tmp_path_factory.mktemp("unbroken")
    run_command("train", *arguments(shards, "run"), cwd=cwd)
    return weights(cwd / "outputs" / "run")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_resumed_equals_unbroken(tmp_path, shards, unbroken, number):
    process = start(tmp_path, shards, "run")
    time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    run = tmp_path / "outputs" / "run"
    assert not (run / "metrics.json").exists(), "it finished before the signal came"
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), output
    if number != signal.SIGKILL:
        assert f"{number.name} at step" in output and f"resume={run}" in output
        assert "Traceback" not in output
    assert not list((run / "checkpoints").glob(".*tmp")) or number == signal.SIGKILL
    run_command("train", "resume=outputs/run", cwd=tmp_path)
    resumed = weights(run)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())
    assert (run / "metrics.json").exists() and (run / "model" / "model.safetensors").exists()
