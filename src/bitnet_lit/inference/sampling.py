"""From logits to a token.

The steps run in this order, each on what the one before left (llama.cpp's and Hugging Face's order; another order
gives other probabilities):

    repeat_penalty   logits of recent tokens are divided by it where positive, multiplied where negative (CTRL,
                     arXiv 1909.05858)
    temperature      logits / temperature; 0 takes the largest and ends here
    top_k            the k largest stay
    top_p            the smallest set of likeliest tokens whose probability reaches p stays (arXiv 1904.09751)
    min_p            tokens with at least min_p times the largest probability stay (arXiv 2407.01082)
    draw             one token, in proportion to what is left

The likeliest token always stays, so there is always something to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingOptions:
    """Names and meanings are `InferConfig`'s."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64


def penalize_repeats(logits: Tensor, recent: Sequence[int], penalty: float) -> Tensor:
    """Make recent tokens less likely; logits (V,), each recent token counted once."""
    if penalty == 1.0 or not recent:
        return logits
    logits = logits.clone()
    tokens = torch.tensor(sorted(set(recent)))
    values = logits[tokens]
    logits[tokens] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def distribution(logits: Tensor, recent: Sequence[int], options: SamplingOptions) -> Tensor:
    """The probabilities that a token is drawn from.

    Args:
        logits: float32 (V,).
        recent: the tokens before, newest last; the last `repeat_last_n` count.

    Returns:
        float32 (V,), sums to 1; with temperature 0 a single 1.
    """
    window = recent[-options.repeat_last_n :] if options.repeat_last_n else ()
    logits = penalize_repeats(logits, window, options.repeat_penalty)
    if options.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    logits = logits / options.temperature
    if 0 < options.top_k < len(logits):
        kth = logits.topk(options.top_k).values[-1]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = logits.softmax(-1)
    if options.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # of all likelier tokens: 0 for the likeliest, which thus stays
        probabilities = probabilities.index_fill(0, order[before >= options.top_p], 0.0)
    if options.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < options.min_p * probabilities.max(), 0.0)
    return probabilities / probabilities.sum()


class Sampler:
    """Draws the tokens of one text.

    Args:
        seed: sample `index` of a seed is a function of both alone; None draws another text each time.
    """

    def __init__(self, options: SamplingOptions, seed: int | None = None, index: int = 0) -> None:
        self.options = options
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((seed * 1_000_003 + index) % 2**63)

    def draw(self, logits: Tensor, recent: Sequence[int]) -> int:
        """One token id; arguments as for `distribution`."""
        probabilities = distribution(logits, recent, self.options)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
