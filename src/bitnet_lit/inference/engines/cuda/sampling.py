"""Sampling on the GPU is a few launches that draw a token of each text, by options that are numbers there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from bitnet_lit.config import GenerationConfig
from bitnet_lit.inference.engines.cuda.gpu_features import early
from bitnet_lit.inference.engines.cuda.kernels.sampling import THRESHOLDS, draw, keep, narrow, peaks, penalize

BLOCK = 2048  # logits of a program
SEARCHES = 5  # launches that find a threshold
LONGEST_WINDOW = 4096
"""Tokens that repeat_penalty can look back; with a longer repeat_last_n the host draws."""
UNIFORMS = 256  # random numbers that are sent ahead, for each text


@dataclass(frozen=True)
class Variant:
    """Says which kernels a step needs.

    Attributes:
        greedy: the likeliest token is taken.
        top_k, top_p, penalty: whether the option is on.
        pieces: tokens that may be drawn: the first of the vocabulary.
    """

    greedy: bool
    top_k: bool
    top_p: bool
    penalty: bool
    pieces: int

    @classmethod
    def of(cls, options: GenerationConfig, pieces: int) -> Variant | None:
        """Return what `options` need; None where the host has to draw."""
        penalty = options.repeat_penalty != 1.0 and options.repeat_last_n > 0
        if penalty and options.repeat_last_n > LONGEST_WINDOW:
            return None
        greedy = options.temperature == 0
        top_k = not greedy and 0 < options.top_k < pieces
        return cls(greedy, top_k, not greedy and options.top_p < 1, penalty, pieces)


def option_numbers(options: GenerationConfig, pieces: int) -> list[float]:
    """Return the options in the places that kernels/sampling.py names."""
    smallest = math.log(options.min_p) if options.min_p > 0 else -math.inf
    top_k, last_n = min(options.top_k, pieces), min(options.repeat_last_n, LONGEST_WINDOW)
    return [options.temperature, top_k, options.top_p, smallest, options.repeat_penalty, last_n]


class SamplingState:
    """Is what sampling keeps on the GPU for each row of a step.

    Attributes:
        token: int64 (B,), what the next step reads.
        drawn: int64 (B,), what was drawn; -1 where the logits are not finite.
        recent, length: int64 (B, LONGEST_WINDOW) and (B,), the last tokens of each text, see `penalize`.
        uniform, count: float64 (B, UNIFORMS) and int64 (B,), random numbers and how many are used.
        options: float32 (6,), see `option_numbers`.
    """

    MOVED = ("token", "recent", "length", "uniform", "count")
    """What belongs to a text, and moves with it to another row."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=device)
        self.recent = torch.zeros(rows, LONGEST_WINDOW, dtype=torch.int64, device=device)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.uniform = torch.zeros(rows, UNIFORMS, dtype=torch.float64, device=device)
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)
        self.options = torch.zeros(6, dtype=torch.float32, device=device)


def sample(logits: Tensor, state: SamplingState, position: Tensor, variant: Variant, advance: bool) -> None:
    """Draw a token of each row into `state`.

    Args:
        logits: float32 (B, V); changed by a penalty.
        position: int64 (B,), where the next token will stand; counted up if `advance`.
    """
    rows, V = logits.shape
    pdl = early(logits.device)
    device, blocks = logits.device, triton.cdiv(variant.pieces, BLOCK)
    shape = {"V": V, "PIECES": variant.pieces, "BLOCKS": blocks, "BLOCK_V": BLOCK}
    rounded = {"ROUND_BLOCKS": triton.next_power_of_2(blocks)}
    if variant.penalty:
        penalize[(rows,)](
            logits, state.recent, state.length, state.options, V=V, RING=LONGEST_WINDOW, num_warps=8, **pdl
        )
    peak = torch.empty(rows, 2, blocks, dtype=torch.float32, device=device)
    where = torch.empty(rows, blocks, dtype=torch.int64, device=device)
    peaks[(blocks, rows)](peak, where, logits, num_warps=4, **shape, **pdl)
    mass = torch.empty(rows, blocks, dtype=torch.float32, device=device)
    threshold = torch.empty(rows, dtype=torch.float32, device=device)
    if not variant.greedy:
        sums = torch.empty(2, rows, blocks, THRESHOLDS.value, dtype=torch.float32, device=device)
        states = torch.empty(2, rows, 3, dtype=torch.float32, device=device)
        searches = [True] * SEARCHES * variant.top_k + [False] * SEARCHES * variant.top_p
        for i, count in enumerate(searches):
            new, old = i % 2, 1 - i % 2
            start = 1 if i == 0 else 2 if not count and searches[i - 1] else 0
            narrow[(blocks, rows)](
                sums[new], states[new], sums[old], states[old], logits, peak, state.options,
                COUNT=count, START=start, num_warps=4, **shape, **rounded, **pdl,
            )  # fmt: skip
        last = (len(searches) - 1) % 2
        keep[(blocks, rows)](
            mass, threshold, sums[last], states[last], logits, peak, state.options,
            SEARCHED=bool(searches), num_warps=4, **shape, **rounded, **pdl,
        )  # fmt: skip
    draw[(rows,)](
        state.drawn, state.token, position, state.recent, state.length, state.uniform, state.count,
        mass, threshold, logits, peak, where, state.options,
        GREEDY=variant.greedy, RING=LONGEST_WINDOW, UNIFORMS=UNIFORMS, ADVANCE=advance, num_warps=4,
        **shape, **rounded, **pdl,
    )  # fmt: skip
