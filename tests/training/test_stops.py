"""What ends a run early: signals, time, divergence, data that is gone, a process of the run that dies."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bitnet_lit.cli import compose
from bitnet_lit.errors import DataError, TrainingStopped, UserError
from bitnet_lit.runs.signals import STOP_SIGNALS, StopSignals, blocked
from bitnet_lit.training import run as run_module
from bitnet_lit.training.callbacks.checkpoints import Checkpoints
from bitnet_lit.training.checkpoint_file import read_checkpoint
from bitnet_lit.training.module import BitNetModule
from bitnet_lit.training.plan import time_limit
from bitnet_lit.training.resume import resume_config
from bitnet_lit.training.run import train
from tests.support import TINY_RUN, start_command


def config(folder, shards, *overrides):
    return compose("train", [f"run_dir={folder}", f"data.dir={shards}", *TINY_RUN, *overrides])


def at_step(monkeypatch, step, action):
    """Run `action` behind an optimizer step, before the callback that saves looks at anything."""
    original = Checkpoints.on_train_batch_end

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == step:
            action()
        original(self, trainer, *arguments)

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", on_train_batch_end)


def send(*numbers):
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def test_a_signal_before_the_first_step_is_one_line(tmp_path, shards, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run_module, "make_plan", lambda *arguments: send(signal.SIGTERM)())
    with pytest.raises(TrainingStopped, match="SIGTERM before the first step: no step was done") as stopped:
        train(config(tmp_path / "run", shards))
    assert stopped.value.status == 128 + signal.SIGTERM
    assert not (tmp_path / "run").exists() and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGXCPU], ids=lambda number: number.name)
def test_what_schedulers_send_saves(tmp_path, shards, monkeypatch, number):
    at_step(monkeypatch, 3, send(number))
    with pytest.raises(TrainingStopped, match=f"{number.name} at step 3 of 8: saved; go on with .*resume=") as stopped:
        train(config(tmp_path / "run", shards))
    assert stopped.value.status == 128 + number
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 3
    monkeypatch.undo()
    assert train(resume_config(str(tmp_path / "run")))["steps"] == 8


@pytest.mark.parametrize(
    ("step", "remedy"),
    [
        (3, "no checkpoint was written: give the same command again$"),
        (6, "go on from step 4 with python -m bitnet_lit.train resume=.*run$"),
    ],
)
def test_the_second_signal_stops_at_once(tmp_path, shards, monkeypatch, step, remedy):
    at_step(monkeypatch, step, send(signal.SIGTERM, signal.SIGINT))
    with pytest.raises(TrainingStopped, match=f"SIGINT for the second time: stopped at once; {remedy}") as stopped:
        train(config(tmp_path / "run", shards))
    assert stopped.value.status == 128 + signal.SIGINT
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert last.exists() == (step > 4) and (step < 4 or read_checkpoint(last)["global_step"] == 4)


def test_a_signal_that_comes_too_late_still_ends_what_started_the_run(tmp_path, shards, monkeypatch):
    original = BitNetModule.on_validation_start

    def on_validation_start(self):
        if self.global_step == 8:
            send(signal.SIGTERM)()
        original(self)

    monkeypatch.setattr(BitNetModule, "on_validation_start", on_validation_start)
    with pytest.raises(TrainingStopped, match=r"SIGTERM: .* is complete") as stopped:
        train(config(tmp_path / "run", shards))
    assert stopped.value.status == 128 + signal.SIGTERM and (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("is_running", [False, True])
def test_a_stop_counts_whatever_a_library_makes_of_it(is_running):
    """Before the first step the first signal stops the run at once, afterwards the second does."""
    with (
        pytest.raises(TrainingStopped, match="SIGTERM (before|for the second time)") as stopped,
        StopSignals() as signals,
    ):
        signals.is_running = is_running
        if is_running:
            signal.raise_signal(signal.SIGTERM)
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise UnboundLocalError("a finally of a library")
    assert stopped.value.status == 128 + signal.SIGTERM


def test_a_library_that_reports_exceptions_does_not_report_a_stop():
    """As PyTorch does while it imports its profiler, with a traceback."""
    with pytest.raises(TrainingStopped, match="SIGTERM before") as stopped, StopSignals():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("a library would report it")
    assert stopped.value.__cause__ is None and stopped.value.__suppress_context__


def test_a_forked_process_leaves_signals_to_its_parent():
    """All but SIGTERM, by which multiprocessing ends it."""
    with StopSignals() as signals:
        child = os.fork()
        if not child:
            for number in STOP_SIGNALS:
                if number != signal.SIGTERM:
                    signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM and signals.number is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_every_process_of_a_run_saves(tmp_path, shards, number):
    """As a terminal, `timeout`, systemd and schedulers send it: also to the processes that read the data."""
    arguments = [f"data.dir={shards}", *TINY_RUN, "run_dir=run", "trainer.max_steps=100000", "data.num_workers=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bitnet_lit.train", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("step "):
                os.killpg(process.pid, number)
                break
        rest, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number, rest
    last = rest.splitlines()[-1]
    assert last.startswith(f"error: {number.name} at step ") and "saved; go on with" in last, rest
    assert "Traceback" not in rest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_waits_while_a_process_that_reads_data_starts(number):
    """It is started with the signals blocked: before it handles them, each would end it."""
    script = (
        "import os, signal\nfrom bitnet_lit.runs.signals import leave_to_parent\n"
        f"os.kill(os.getpid(), {int(number)})\nleave_to_parent()\nprint('goes on')\n"
    )
    with blocked():
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "goes on\n", "")


def test_a_signal_that_another_thread_gets_waits_for_the_end_of_the_block():
    """The main thread must not leave a process half started."""
    thread = threading.Thread(target=time.sleep, args=(10,), daemon=True)
    thread.start()  # it blocks no signal
    ended = []
    with pytest.raises(TrainingStopped, match="SIGTERM before the first step"), StopSignals(), blocked():
        signal.pthread_kill(thread.ident, signal.SIGTERM)
        time.sleep(0.2)
        ended.append(True)
    assert ended


def test_a_stop_that_a_library_has_caught_is_not_lost():
    with StopSignals() as signals:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        assert signals.number == signal.SIGTERM  # the run ends with it at its first step


def test_what_the_caller_ignores_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with StopSignals() as signals:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
            assert signals.number is None
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_time_is_up_before_the_first_validation(tmp_path, shards):
    """A whole end: validation, checkpoint, model, figures; and the run goes on where it was."""
    metrics = train(config(tmp_path / "run", shards, "trainer.max_time=00:00:00:00"))
    assert metrics["steps"] == 1 and metrics["val/loss"] > 0 and metrics["train/loss"] > 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert train(resume_config(str(tmp_path / "run")))["steps"] == 2  # the time of each process counts anew
    assert train(resume_config(str(tmp_path / "run"), ["trainer.max_time=null"]))["steps"] == 8
    rows = [line.split(",")[0] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    assert rows == ["1", "1", "2", "2", "3", "4", "4", "5", "6", "7", "8", "8"]


@pytest.mark.parametrize("text", ["5m", "00:05:00", "1:2:3:4", "", "-1:00:00:00", "\u0660\u0660:00:00:01"])
def test_a_time_that_is_none_is_named(text):
    with pytest.raises(UserError, match=r"trainer.max_time=.*write it as DD:HH:MM:SS"):
        time_limit(text)


def test_time_is_up_between_two_batches_of_a_step(tmp_path, shards):
    """A step that accumulates is finished first: a checkpoint within it would lose half of its gradient."""
    options = ["trainer.accumulate_grad_batches=3", "trainer.max_steps=2", "trainer.val_check_interval=1"]
    train(config(tmp_path / "whole", shards, *options))
    assert train(config(tmp_path / "run", shards, "trainer.max_time=00:00:00:00", *options))["steps"] == 1
    train(resume_config(str(tmp_path / "run"), ["trainer.max_time=null"]))
    whole, resumed = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "run"))
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name])


def diverging(monkeypatch, factor):
    """Every gradient of one matrix is multiplied by `factor` from the second step on."""
    original = BitNetModule.training_step

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            self.model.get_parameter("model.layers.0.mlp.up_proj.weight").register_hook(lambda grad: grad * factor)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(BitNetModule, "training_step", training_step)


@pytest.mark.parametrize(
    ("factor", "what", "has_checkpoint"),
    [
        (float("nan"), "the gradient of model.layers.0.mlp.up_proj.weight is not finite", False),
        (1e30, r"the norm of the gradient is not finite \(the largest is that of .*0.mlp.up_proj.weight\)", True),
    ],
)
def test_divergence_names_the_layer_and_what_is_kept(tmp_path, shards, monkeypatch, factor, what, has_checkpoint):
    diverging(monkeypatch, factor)
    kept = f"the last checkpoint is kept: .*resume={tmp_path}" if has_checkpoint else "there is no checkpoint yet"
    options = ["callbacks.checkpoint_every_n_steps=1"] if has_checkpoint else []
    with pytest.raises(TrainingStopped, match=f"step 1: {what}.*lower optim.learning_rate; {kept}"):
        train(config(tmp_path / "run", shards, *options))


def test_processes_that_read_data_and_cannot_be_started(tmp_path, shards, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")  # as where semaphores find no room in /dev/shm

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", full)
    with pytest.raises(UserError, match=r"data.num_workers=1: .*\(No space left on device\): take data.num_workers=0"):
        train(config(tmp_path / "run", shards, "data.num_workers=1"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_breaks_while_it_is_read(tmp_path, shards, monkeypatch, workers):
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    whole = (data / "data01.bin").read_bytes()
    at_step(monkeypatch, 3, lambda: os.truncate(data / "data01.bin", 100))
    options = [f"data.num_workers={workers}", "trainer.max_steps=40", "trainer.val_check_interval=40"]
    with pytest.raises(DataError, match=r"data01.bin.*the last checkpoint is kept: .*resume=") as error:
        train(config(tmp_path / "run", data, *options))
    assert "\n" not in str(error.value)
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert saved >= 3
    monkeypatch.undo()
    (data / "data01.bin").write_bytes(whole)
    metrics = train(resume_config(str(tmp_path / "run")))
    assert metrics["steps"] == 40
    if workers == 0:
        train(config(tmp_path / "whole", shards, *options))
        unbroken, resumed = (read_checkpoint(tmp_path / n / "checkpoints" / "last.ckpt") for n in ("whole", "run"))
        for name, tensor in unbroken["state_dict"].items():
            assert torch.equal(tensor, resumed["state_dict"][name])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the second process in /proc")
def test_a_rank_that_is_killed_is_one_line(tmp_path, shards):
    options = ["trainer=ddp_sim", "trainer.max_steps=100000", "trainer.val_check_interval=20"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bitnet_lit.train", f"data.dir={shards}", *TINY_RUN, *options, "hydra.run.dir=run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        others = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(others[0]), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and "Traceback" not in output, output
    assert len(re.findall(r"error: rank 0 of 2 lost the others .*resume=", output)) == 1, output
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] > 0


@pytest.mark.slow
def test_wandb_without_a_login_stays_offline(tmp_path, shards):
    """Nothing in the environment says so: no WANDB_MODE, no key, no file of keys."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    options = ["logger=wandb", "trainer.max_steps=1", "hydra.run.dir=run"]
    start_command(
        "train", f"data.dir={shards}", *TINY_RUN, *options, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL
    )
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 1
