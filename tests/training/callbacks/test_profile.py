"""Profiling: one rank writes the trace and the table, of as many optimizer steps as were asked for."""

import json
from types import SimpleNamespace

import pytest
import torch

from bitnet_lit.cli import compose
from bitnet_lit.training.callbacks.profile import Profile
from bitnet_lit.training.run import train
from tests.support import TINY_RUN


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_writes(tmp_path, rank):
    callback = Profile(tmp_path, 2)
    trainer = SimpleNamespace(is_global_zero=rank == 0, accumulate_grad_batches=1)
    module = SimpleNamespace(device=torch.device("cpu"))
    callback.on_train_start(trainer, module)
    for _ in range(5):
        torch.ones(3).sum()
        callback.on_train_batch_end(trainer, module, None, None, 0)
    callback.on_train_end(trainer, module)
    written = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert written == (["table.txt", "trace.json"] if rank == 0 else [])


@pytest.mark.parametrize("batches", [1, 3])
def test_optimizer_steps_are_traced_and_not_batches(tmp_path, shards, batches):
    options = [f"trainer.accumulate_grad_batches={batches}", "callbacks.profile_steps=2", "callbacks.sample_prompts=[]"]
    train(compose("train", [f"run_dir={tmp_path}", f"data.dir={shards}", *TINY_RUN, *options]))
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert sum(str(event.get("name")).startswith("ProfilerStep#") for event in events) == 2
    assert sum(str(event.get("name")).startswith("Optimizer.step#MuonAdamW") for event in events) == 2
