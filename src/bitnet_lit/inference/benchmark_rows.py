"""A row of a benchmark compares two rates, ours and a peer's, that are measured in turns.

A machine that slows down then slows both. Every figure is the median of the rounds, and the spread says how far apart
the rounds were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from bitnet_lit.config import ModelConfig

Timed = Callable[[], float]
"""Does some work, and returns its rate."""


def shape_config(shape: tuple[int, int, int, int], vocabulary: int, context: int) -> ModelConfig:
    """Return a network of a shape: hidden size, layers, feed-forward, heads. Its name is that of the shape's rows."""
    hidden, layers, feed_forward, heads = shape
    return ModelConfig(
        name="/".join(map(str, shape)),
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=feed_forward,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=context,
    )


def interleaved(ours: Timed, theirs: Timed, rounds: int, pause: float = 0.0) -> tuple[list[float], list[float]]:
    """Return two rates of each round. A round before them warms caches, threads and allocators, and compiles kernels.

    Args:
        pause: seconds before each measurement.
    """
    ours(), theirs()

    def measured(run: Timed) -> float:
        time.sleep(pause)
        return run()

    pairs = [(measured(ours), measured(theirs)) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def compared(
    shape: str, what: str, peer: str, rates: tuple[Sequence[float], Sequence[float]], unit: str, digits: int = 0
) -> dict[str, Any]:
    """Return a row of the table that `bench` prints.

    Args:
        rates: ours and the peer's, of each round.
        digits: of the spread, after the decimal point.
    """
    ours, theirs = map(median, rates)
    spread = " / ".join(f"{min(each):,.{digits}f}-{max(each):,.{digits}f}" for each in rates)
    return {
        "shape": shape,
        "what": what,
        "ours": ours,
        "peer": peer,
        "theirs": theirs,
        "unit": unit,
        "ratio": ours / theirs,
        "spread": spread,
    }
