"""From logits to a token.

The options of `GenerationConfig` act in this order, each on what the one before left. It is llama.cpp's and Hugging
Face's order; another order gives other probabilities.

    repeat_penalty   logits of recent tokens are divided by it where positive, multiplied where negative (CTRL,
                     arXiv 1909.05858)
    temperature      logits / temperature; 0 takes the largest and ends here
    top_k            the k largest stay
    top_p            the smallest set of likeliest tokens whose probability reaches p stays (arXiv 1904.09751)
    min_p            tokens with at least min_p times the largest probability stay (arXiv 2407.01082)
    draw             one token, in proportion to what is left

The likeliest token always stays, so there is always something to draw. Where the largest logit is NaN or infinite there
is no likeliest token: `NotFiniteError`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.config import GenerationConfig
from bitnet_lit.errors import ModelError

Floats = NDArray[np.float32]

LARGEST_LOGIT = float(np.finfo(np.float32).max)


class NotFiniteError(ModelError):
    """Raised where logits are NaN or infinite."""


def penalize_repeats(logits: Floats, recent: Sequence[int], penalty: float) -> Floats:
    """Make recent tokens less likely, each once however often it came; logits (V,)."""
    if penalty == 1.0 or not recent:
        return logits
    logits = logits.copy()
    tokens = np.array(sorted(set(recent)))
    values = logits[tokens]
    with np.errstate(over="ignore"):
        penalized = np.where(values > 0, values / penalty, values * penalty)
    logits[tokens] = penalized.clip(-LARGEST_LOGIT, LARGEST_LOGIT)
    return logits


def nucleus(probabilities: Floats, top_p: float) -> NDArray[np.intp]:
    """The likeliest tokens whose probability together reaches `top_p`, likeliest first.

    Sorting a whole vocabulary takes longer than a small model's decode step, and the set is mostly a few tokens. So
    only tokens above a threshold are sorted, and the threshold is lowered until they are enough.
    """
    threshold = float(probabilities.max())
    while True:
        threshold /= 16
        likely = np.flatnonzero(probabilities >= threshold)
        if len(likely) == len(probabilities) or probabilities[likely].sum(dtype=np.float64) >= top_p:
            break
    likely = likely[np.argsort(-probabilities[likely], kind="stable")]
    ordered = probabilities[likely].astype(np.float64)
    before = np.cumsum(ordered) - ordered  # of all likelier tokens: 0 for the likeliest, which thus stays
    return likely[before < top_p]


def distribution(logits: Floats, recent: Sequence[int], options: GenerationConfig) -> Floats:
    """The probabilities that the next token is drawn from.

    Args:
        logits: float32 (V,).
        recent: the tokens before, newest last; the last `options.repeat_last_n` count.

    Returns:
        float32 (V,), sums to 1; with temperature 0 a single 1.

    Raises:
        NotFiniteError: the largest logit is NaN or infinite.
    """
    window = recent[-options.repeat_last_n :] if options.repeat_last_n else ()
    logits = penalize_repeats(logits, window, options.repeat_penalty)
    likeliest = int(logits.argmax())  # a NaN, where there is one
    largest = logits[likeliest]
    if not np.isfinite(largest):
        raise NotFiniteError("logits are not finite")
    if options.temperature == 0:
        return np.eye(1, len(logits), likeliest, dtype=np.float32)[0]
    with np.errstate(over="ignore"):  # a difference of -infinity is a probability of 0
        logits = (logits - largest) / np.float32(options.temperature)
    if 0 < options.top_k < len(logits):
        kth = np.partition(logits, -options.top_k)[-options.top_k]
        logits = np.where(logits < kth, np.float32(-np.inf), logits)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum()
    if options.top_p < 1:
        stays = nucleus(probabilities, options.top_p)
        kept = np.zeros_like(probabilities)
        kept[stays] = probabilities[stays]
        probabilities = kept
    if options.min_p > 0:
        probabilities[probabilities < options.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


class Sampler:
    """Draws the tokens of one text.

    Args:
        options: its `seed` and `index` alone decide the random numbers; without a seed they differ each time.
        index: the number of the text, where several are drawn with one seed.
    """

    def __init__(self, options: GenerationConfig, index: int = 0) -> None:
        self.options = options
        seed = options.seed
        # numpy promises the same bits of PCG64 on every machine and in every version.
        self._bits = np.random.PCG64(None if seed is None else [abs(seed), seed < 0, index])

    def uniform(self) -> float:
        """The next random number in [0, 1); each token takes one."""
        return float((self._bits.random_raw() >> 11) * 2.0**-53)

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """The next random numbers, float64 (count,): those that `uniform` would give one after the other."""
        return (self._bits.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def draw(self, logits: Floats, recent: Sequence[int]) -> int:
        """Draw one token id; `logits` and `recent` are those of `distribution`."""
        sums = distribution(logits, recent, self.options).cumsum(dtype=np.float64)
        token = int(np.searchsorted(sums, self.uniform() * sums[-1], side="right"))
        # A number that rounds to the whole sum would fall behind the last token that can be drawn.
        return min(token, int(np.searchsorted(sums, sums[-1])))
