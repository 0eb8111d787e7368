"""`bench suite=cpu_train`: training steps on the CPU, in C++ (native/) beside the plain PyTorch that it stands for.

A step is the forward pass, the loss, the backward pass, clipping, and Muon with AdamW, in float32. Both sides train the
same network on the same random tokens, which take as long as text. "Theirs" is quant.kernel=reference with the
iterations of Muon in PyTorch. Each round measures both, one after the other, so that a processor that slows down slows
both; the ratio is the median over the rounds.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from bitnet_lit.config import BenchConfig, ModelConfig, MuonConfig, QuantConfig
from bitnet_lit.inference.engines.cpu.cores import allowed_threads
from bitnet_lit.model import build_model
from bitnet_lit.model.transformer import batch_loss
from bitnet_lit.native.library import switched_off
from bitnet_lit.training.freed_memory import keep_freed_memory
from bitnet_lit.training.optimizers import build_optimizer

SHAPES = (  # hidden, layers, feed-forward, heads, vocabulary; sequences and tokens of a batch
    (128, 4, 384, 4, 1024, 8, 128),  # experiment=demo
    (192, 4, 512, 6, 2048, 8, 256),  # experiment=tinystories_2048
    (256, 8, 768, 8, 32000, 4, 256),  # model=15m
)
QUANTS = ("b158", "b1", "none")
WARM_UP_STEPS, ROUND_SECONDS = 2, 0.5


def _step(shape: tuple[int, ...], quant: str, is_native: bool) -> Callable[[], None]:
    """Return a function that does one training step."""
    hidden, layers, feed_forward, heads, vocabulary, batch, length = shape
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=length,
    )
    model = build_model(config, QuantConfig(name=quant, kernel="native" if is_native else "reference"))
    optimizer = build_optimizer(model, MuonConfig())
    ids = torch.randint(vocabulary, (batch, length + 1))
    parameters = list(model.parameters())  # as training keeps them

    def step() -> None:
        with contextlib.nullcontext() if is_native else switched_off():
            batch_loss(model, ids).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def _seconds(step: Callable[[], None], steps: int) -> float:
    """Return the median duration of a step."""
    durations = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def cpu_train_rows(config: BenchConfig) -> list[dict[str, object]]:
    """Measure training on the CPU, for each shape and quant. A row has the names of the JSON that `bench` prints."""
    keep_freed_memory()
    threads, before = allowed_threads(config.threads), torch.get_num_threads()
    rows: list[dict[str, object]] = []
    torch.set_num_threads(threads)
    try:
        for shape in SHAPES:
            for quant in QUANTS:
                rows.append(_row(shape, quant, config.rounds))
    finally:
        torch.set_num_threads(before)
    return rows


def _row(shape: tuple[int, ...], quant: str, rounds: int) -> dict[str, object]:
    ours, theirs = _step(shape, quant, True), _step(shape, quant, False)
    slow = max(_seconds(step, WARM_UP_STEPS) for step in (ours, theirs))
    steps = max(1, round(ROUND_SECONDS / slow))
    seconds = [(_seconds(ours, steps), _seconds(theirs, steps)) for _ in range(rounds)]
    tokens = shape[5] * shape[6]
    mine, other = (statistics.median(tokens / side[i] for side in seconds) for i in (0, 1))
    return {
        "shape": "/".join(map(str, shape[:4])) + f", {shape[5]} x {shape[6]}",
        "what": f"train {quant}",
        "ours": round(mine, 1),
        "peer": "PyTorch (quant.kernel=reference)",
        "theirs": round(other, 1),
        "unit": "tokens/s",
        "ratio": round(statistics.median(pair[1] / pair[0] for pair in seconds), 2),
    }
