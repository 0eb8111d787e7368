"""The rows of `bench suite=cpu`, on a network small enough for a test."""

import json

import pytest

from bitnet_lit.config import BenchConfig
from bitnet_lit.inference import benchmark
from bitnet_lit.inference.engines.cpu import native
from tests.inference.test_cpu_engine import needs_compiler


@needs_compiler
def test_rows_of_every_peer_and_of_the_memory(monkeypatch):
    monkeypatch.setattr(benchmark, "SHAPES", ((256, 1, 256, 4),))
    monkeypatch.setattr(benchmark, "BANDWIDTH_BYTES", 2**24)
    rows = benchmark.cpu_rows(BenchConfig(suite="cpu", rounds=2, threads=2))
    assert json.loads(json.dumps(rows)) == rows
    assert {row["shape"] for row in rows} == {"256/1/256/4"}
    compared = {(row["peer"], row["what"]) for row in rows if row["unit"] == "tokens/s"}
    peers = {peer for peer, _ in compared}
    assert {"PyTorch, eager", "transformers, eager"} <= peers
    assert compared == {(peer, what) for peer in peers for what in ("decode", "prefill")}
    for row in rows:
        assert row["ours"] > 0 and row["theirs"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    # Seven ternary matrices at 2 bits, or with AVX2 in blocks of 160 bytes for 32 rows and 24 inputs; the head's bytes,
    # scales and sums; float16 keys and values of 192 tokens.
    ternary = 8 * 11 * 160 if native.library().bitnet_simd() == b"avx2" else 256 * 256 / 4
    expected = 7 * ternary + 32000 * (256 + 8) + 2 * 192 * 256 * 2
    assert rows[-1]["unit"] == "GB/s" and rows[-1]["what"] == f"decode reads {expected / 1e6:,.1f} MB a token"
