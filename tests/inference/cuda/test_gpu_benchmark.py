"""The rows of `bench suite=gpu_decode`, on a network small enough for a test."""

import json

import pytest

from bitnet_lit.config import BenchConfig

pytestmark = pytest.mark.gpu


def test_rows_of_every_peer_and_of_the_memory(monkeypatch):
    from bitnet_lit.inference import gpu_benchmark

    monkeypatch.setattr(gpu_benchmark, "SHAPES", ((256, 1, 512, 4),))
    monkeypatch.setattr(gpu_benchmark, "VOCABULARY", 1024)
    monkeypatch.setattr(gpu_benchmark, "BATCHES", (1, 2))
    monkeypatch.setattr(gpu_benchmark, "COPIED_BYTES", 2**24)
    rows = gpu_benchmark.gpu_decode_rows(BenchConfig(suite="gpu_decode", rounds=2))
    assert json.loads(json.dumps(rows)) == rows
    assert {row["shape"] for row in rows} == {"256/1/512/4"}
    compared = [(row["what"], row["peer"]) for row in rows if row["unit"] == "tokens/s"]
    assert compared == [
        ("decode, batch 1", "dense twin, bfloat16"),
        ("generate greedily, batch 1", "the engine's decode"),
        ("generate by the defaults, batch 1", "the engine's decode"),
        ("decode, batch 2", "dense twin, bfloat16"),
        ("generate greedily, batch 2", "the engine's decode"),
        ("generate by the defaults, batch 2", "the engine's decode"),
        ("decode, batch 1", "PyTorch, eager"),
    ]
    for row in rows:
        assert row["ours"] > 0 and row["theirs"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    # Seven matrices at 2 bits, the head's bytes, and float16 keys and values of 192 tokens.
    expected = (4 * 256 * 256 + 3 * 256 * 512) / 4 + 1024 * 256 + 2 * 192 * 256 * 2
    (memory,) = [row for row in rows if row["unit"] == "GB/s"]
    assert memory["what"] == f"decode reads {expected / 1e6:,.1f} MB a token"
