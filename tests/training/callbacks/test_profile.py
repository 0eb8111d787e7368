"""Profiling: one rank writes the trace and the table."""

from types import SimpleNamespace

import pytest
import torch

from bitnet_lit.training.callbacks.profile import Profile


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_writes(tmp_path, rank):
    callback = Profile(tmp_path, 2)
    trainer, module = SimpleNamespace(is_global_zero=rank == 0), SimpleNamespace(device=torch.device("cpu"))
    callback.on_train_start(trainer, module)
    for _ in range(5):
        torch.ones(3).sum()
        callback.on_train_batch_end(trainer, module, None, None, 0)
    callback.on_train_end(trainer, module)
    written = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert written == (["table.txt", "trace.json"] if rank == 0 else [])
