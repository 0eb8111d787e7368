"""What a dry run says of the time that jobs will take."""

import json

import pytest
import torch

from bitnet_lit.cli import compose
from bitnet_lit.runs.job_folder import State
from bitnet_lit.terminal import time_span
from bitnet_lit.training import preview
from tests.support import TINY_RUN


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_a_machine_without_the_device_says_so(tmp_path, shards, monkeypatch, capsys, accelerator):
    """As a login node, on which a job is prepared."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(preview, "device_memory_bytes", lambda trainer: 1)
    typed = [item for item in TINY_RUN if not item.startswith("trainer.accelerator")]
    config = compose("train", [*typed, f"data.dir={shards}", f"trainer.accelerator={accelerator}"])
    preview.preview([("run", tmp_path / "run", State.NEW, config)])
    shown = capsys.readouterr().out
    note = f"note: trainer.accelerator={accelerator}: this machine has no such device, and would refuse to train"
    assert note in shown and "may not fit" not in shown and "of training" not in shown
    assert "a dry run on a machine that has one tells the time and whether the memory is enough\n" in shown
    config.trainer.accelerator = "cpu"
    preview.preview([("run", tmp_path / "run", State.NEW, config)])
    shown = capsys.readouterr().out
    assert (
        "note: " not in shown and "may not fit" in shown and "of training and validation one after the other" in shown
    )


def test_a_machine_with_fewer_gpus_says_so(tmp_path, shards, monkeypatch, capsys):
    for name, answer in {"is_available": True, "device_count": 2, "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(preview, "device_memory_bytes", lambda trainer: 2**36)
    monkeypatch.setattr(preview, "measured_peak_flops", lambda device, dtype: 1e9)
    typed = [item for item in TINY_RUN if not item.startswith("trainer.accelerator")]
    for devices, nodes, note in (("2", 1, ""), ("4", 1, "trainer.devices=4: this machine has 2"), ("2", 4, "")):
        chosen = [f"trainer.devices={devices}", f"trainer.num_nodes={nodes}"]
        config = compose("train", [*typed, f"data.dir={shards}", *chosen])
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setattr(preview, "check_launcher", lambda *_: None)
        preview.preview([("run", tmp_path / "run", State.NEW, config)])
        shown = capsys.readouterr().out
        assert (f"note: {note}, and would refuse to train" in shown) if note else "note: " not in shown


@pytest.mark.parametrize("state", [State.NEW, State.DONE])
def test_several_gpus_are_so_many_times_as_fast(tmp_path, shards, monkeypatch, capsys, state):
    """The tokens of a job are those of all its devices, and so is its logged speed."""
    gpus = {"is_available": lambda: True, "device_count": lambda: 8, "get_device_capability": lambda *_: (9, 0)}
    for name, answer in gpus.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(preview, "device_memory_bytes", lambda trainer: 2**36)
    monkeypatch.setattr(preview, "measured_peak_flops", lambda device, dtype: 1e9)
    typed = [item for item in TINY_RUN if not item.startswith("trainer.accelerator")]
    configs = {
        devices: compose(
            "train", [*typed, f"data.dir={shards}", "trainer.accelerator=gpu", f"trainer.devices={devices}"]
        )
        for devices in (1, 8)
    }
    plans = {devices: preview.check_run(config).plan for devices, config in configs.items()}
    assert plans[8].tokens == 8 * plans[1].tokens  # each device has batches of its own
    if state is State.DONE:  # a job on eight GPUs, which took 10 seconds for its steps
        (tmp_path / "metrics.json").write_text(json.dumps({"perf/tokens_per_s": plans[8].tokens / 10}))
        jobs, speed = [("done", tmp_path, State.DONE, configs[8])], plans[8].tokens / 10 * plans[8].flops_per_token / 8
    else:
        jobs, speed = [], preview.TYPICAL_SHARE * 1e9
    seconds = sum(plan.flops_after(0) / gpus / speed for gpus, plan in plans.items())
    preview.preview([*jobs, *((str(n), tmp_path / str(n), State.NEW, config) for n, config in configs.items())])
    shown = capsys.readouterr().out
    assert f"about {time_span(seconds)} of training and validation one after the other" in shown and "note" not in shown
    (tmp_path / "error.txt").write_text("UserError: no data\n")
    preview.preview([("failed", tmp_path, State.FAILED, configs[1])])
    shown = capsys.readouterr().out
    assert " note " in shown and " no data " in shown  # the last column is there where a job has something to say
