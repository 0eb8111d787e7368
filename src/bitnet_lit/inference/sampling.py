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

The likeliest token always stays, so there is always something to draw. Logits that are no numbers (NaN, infinity) have
no likeliest token: `NotFiniteError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.config.doors import SAMPLING
from bitnet_lit.errors import ModelError, UserError

Floats = NDArray[np.float32]

LARGEST_LOGIT = float(np.finfo(np.float32).max)


class NotFiniteError(ModelError):
    """Logits that are no numbers."""


def require_whole(key: str, value: object, least: int | None = None) -> None:
    """Refuse what is no whole number, or less than `least`; True and False are no numbers.

    Raises:
        UserError: with the key and the value.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{key}={value!r}: must be a whole number")
    if least is not None and value < least:
        raise UserError(f"{key}={value}: must be {least} or more")


@dataclass(frozen=True)
class SamplingOptions:
    """Names and meanings are `InferConfig`'s.

    Raises:
        UserError: a value that is no number, not finite, or beyond its range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64

    def __post_init__(self) -> None:
        require_whole("top_k", self.top_k)
        require_whole("repeat_last_n", self.repeat_last_n)
        for key, allowed in SAMPLING.items():
            allowed.check(key, getattr(self, key))


def penalize_repeats(logits: Floats, recent: Sequence[int], penalty: float) -> Floats:
    """Make recent tokens less likely; logits (V,), each recent token counted once."""
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

    Sorting a whole vocabulary takes longer than a small model takes for a token, and the set is mostly a few tokens: so
    only those above a border are sorted, and the border is lowered until they are enough.
    """
    border = float(probabilities.max())
    while True:
        border /= 16
        likely = np.flatnonzero(probabilities >= border)
        if len(likely) == len(probabilities) or probabilities[likely].sum(dtype=np.float64) >= top_p:
            break
    likely = likely[np.argsort(-probabilities[likely], kind="stable")]
    ordered = probabilities[likely].astype(np.float64)
    before = np.cumsum(ordered) - ordered  # of all likelier tokens: 0 for the likeliest, which thus stays
    return likely[before < top_p]


def distribution(logits: Floats, recent: Sequence[int], options: SamplingOptions) -> Floats:
    """The probabilities that a token is drawn from.

    Args:
        logits: float32 (V,).
        recent: the tokens before, newest last; the last `repeat_last_n` count.

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
        seed: sample `index` of a seed is a function of both alone; None draws another text each time.
    """

    def __init__(self, options: SamplingOptions, seed: int | None = None, index: int = 0) -> None:
        self.options = options
        # numpy promises the same bits of PCG64 on every machine and in every version.
        self._bits = np.random.PCG64(None if seed is None else [abs(seed), seed < 0, index])

    def draw(self, logits: Floats, recent: Sequence[int]) -> int:
        """One token id; arguments as for `distribution`."""
        sums = distribution(logits, recent, self.options).cumsum(dtype=np.float64)
        uniform = (self._bits.random_raw() >> 11) * 2.0**-53  # in [0, 1)
        token = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
        # A number that rounds to the whole sum would fall behind the last token that can be drawn.
        return min(token, int(np.searchsorted(sums, sums[-1])))
