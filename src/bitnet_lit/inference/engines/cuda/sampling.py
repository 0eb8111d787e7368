"""Sampling on the GPU is a launch that draws a token of each text, by options that are numbers there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from bitnet_lit.config import GenerationConfig
from bitnet_lit.inference.engines.cuda.gpu_features import early, multiprocessors
from bitnet_lit.inference.engines.cuda.kernels import sampling as kernels

LONGEST_WINDOW = 4096
"""Tokens that repeat_penalty can look back; with a longer repeat_last_n the host draws."""
MOST_THRESHOLDS = 8
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
        drawn: int64 (UNIFORMS, B), what was drawn by each random number; -1 where the logits are not finite. It is
            memory of the host that the GPU writes to, so tokens come without a copy behind each step.
        recent, length: int64 (B, LONGEST_WINDOW) and (B,), the last tokens of each text, see `penalize`.
        uniform, count: float64 (B, UNIFORMS) and int64 (B,), random numbers and how many are used.
        options: float32 (6,), see `option_numbers`.
        messages, launch: int64 (B, n) and int32 (B,), in which the programs of a text meet, see kernels/sampling.py.
    """

    MOVED = ("token", "recent", "length", "uniform", "count")
    """Names of the tensors that belong to a text, and move with it to another row."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.drawn = torch.zeros(UNIFORMS, rows, dtype=torch.int64, pin_memory=True)
        self.recent = torch.zeros(rows, LONGEST_WINDOW, dtype=torch.int64, device=device)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.uniform = torch.zeros(rows, UNIFORMS, dtype=torch.float64, device=device)
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)
        self.options = torch.zeros(6, dtype=torch.float32, device=device)
        words = 2 * _most_programs(rows, device) * MOST_THRESHOLDS
        self.messages = torch.zeros(rows, words, dtype=torch.int64, device=device)
        self.launch = torch.zeros(rows, dtype=torch.int32, device=device)


def _most_programs(rows: int, device: torch.device) -> int:
    """Return how many programs a text may have. They wait for each other, so those of all texts must run at once."""
    return max(1, multiprocessors(device) // rows)  # one on each


def _division(rows: int, pieces: int, device: torch.device) -> dict[str, int]:
    """Return how many programs draw the token of a text, how they divide its logits, and how they search.

    More thresholds take fewer passes, but a program has to add up and reduce a sum for each. Of 4 to 16 thresholds, 2
    to 16 warps and blocks of 1024 to 16384 logits these took the least time on an H200, in the mean over 32,000 and
    128,256 logits that are flat (a temperature of 0.8, deviations of 0.55) and peaked (3): the first for one text, the
    second for 64.
    """
    most = _most_programs(rows, device)
    block = max(1024, min(4096, triton.next_power_of_2(triton.cdiv(pieces, most))))
    blocks = triton.cdiv(triton.cdiv(pieces, block), most)
    programs = triton.cdiv(pieces, block * blocks)
    search = {"THRESHOLDS": MOST_THRESHOLDS, "num_warps": 4} if block == 1024 else {"THRESHOLDS": 4, "num_warps": 16}
    return {"BLOCK_V": block, "BLOCKS": blocks, "PROGRAMS": programs, **search}


def sample(logits: Tensor, state: SamplingState, position: Tensor, variant: Variant, advance: bool) -> None:
    """Draw a token of each row into `state`.

    Args:
        logits: float32 (B, V); changed by a penalty.
        position: int64 (B,), where the next token will stand; counted up if `advance`.
    """
    rows, V = logits.shape
    if variant.penalty:
        kernels.penalize[(rows,)](
            logits, state.recent, state.length, state.options,
            V=V, RING=LONGEST_WINDOW, num_warps=8, **early(logits.device),
        )  # fmt: skip
    division = _division(rows, variant.pieces, logits.device)
    programs = division["PROGRAMS"]
    kernels.sample[(programs, rows)](
        state.drawn, state.token, position, state.recent, state.length, state.uniform, state.count,
        logits, state.messages, state.launch, state.options, state.messages.shape[1],
        V=V, PIECES=variant.pieces, ROUND=triton.next_power_of_2(programs),
        ROUND_BLOCKS=triton.next_power_of_2(division["BLOCKS"]), GREEDY=variant.greedy, SEARCH_K=variant.top_k,
        SEARCH_P=variant.top_p, RING=LONGEST_WINDOW, UNIFORMS=UNIFORMS, ADVANCE=advance,
        launch_cooperative_grid=programs > 1, **division,
    )  # fmt: skip
