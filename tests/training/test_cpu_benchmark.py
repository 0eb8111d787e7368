"""The rows of `bench suite=cpu_train`, on a network small enough for a test."""

import json

import pytest
import torch

from bitnet_lit.config import BenchConfig
from bitnet_lit.native import library
from bitnet_lit.training import cpu_benchmark


@pytest.mark.skipif(not library.is_available(), reason="no C++ compiler")
def test_rows_of_every_quant(monkeypatch):
    monkeypatch.setattr(cpu_benchmark, "SHAPES", ((32, 1, 64, 2, 100, 2, 16),))
    monkeypatch.setattr(cpu_benchmark, "ROUND_SECONDS", 0)
    threads = torch.get_num_threads()
    rows = cpu_benchmark.cpu_train_rows(BenchConfig(suite="cpu_train", rounds=3, threads=1))
    assert json.loads(json.dumps(rows)) == rows and torch.get_num_threads() == threads
    assert [row["what"] for row in rows] == ["train b158", "train b1", "train none"]
    assert all(row["ours"] > 0 and row["theirs"] > 0 and row["ratio"] > 0 for row in rows)
    assert {row["shape"] for row in rows} == {"32/1/64/2, 2 x 16"}
