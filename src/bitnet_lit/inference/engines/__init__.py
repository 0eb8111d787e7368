"""An engine computes logits from token ids. Everything above works with any engine.

An engine keeps no state of a text. The keys and values of each text lie in a cache of its own, so one engine serves
many texts at the same time, and a step can take several of them: they share one pass over the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.errors import UserError


class Cache(Protocol):
    """Holds the keys and values of one text."""

    @property
    def length(self) -> int:
        """Return how many tokens it holds."""

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""

    def fork(self) -> Any:
        """Return a copy that can go on by itself: several texts from one prompt."""


class Engine(Protocol):
    """Describes what generation needs of an engine."""

    name: str
    """The engine as users see it: "PyTorch", or the native engine with its instruction set and threads."""
    max_length: int
    """The context, in tokens."""
    texts_at_once: int
    """Texts that are best generated together: they share each pass over the weights, and every text takes memory."""

    def new_cache(self) -> Any:
        """Return an empty cache of the kind that `forward` takes."""

    def forward(self, ids: Sequence[Sequence[int]], caches: Sequence[Any]) -> NDArray[np.float32]:
        """Append ids[i], one token or more, to the text of caches[i], and compute what follows.

        Several threads may call it at the same time, each with caches of its own.

        Args:
            ids: new tokens of each text.
            caches: one for each text; no cache twice.

        Returns:
            Logits of the token after each text: float32 (len(ids), V).

        Raises:
            UserError: a token or a position that the model does not have; see `check_step`.
        """


def check_step(ids: Sequence[Sequence[int]], lengths: Sequence[int], vocabulary: int, context: int) -> None:
    """Refuse a step that would read beyond the model's tables.

    Args:
        ids: new tokens of each text, as for `Engine.forward`.
        lengths: tokens that each text has in its cache.
        vocabulary: rows of the model's embedding.
        context: the longest text, in tokens.

    Raises:
        UserError: a text without a new token, a token beyond the vocabulary, or a text beyond the context.
    """
    for row, length in zip(ids, lengths, strict=True):
        if not len(row):
            raise UserError("a step of no token: each text needs one, BOS at least")
        if min(row) < 0 or max(row) >= vocabulary:
            raise UserError(
                f"token {min(row) if min(row) < 0 else max(row)}: the model's vocabulary has {vocabulary} rows: the "
                "tokenizer is another model's"
            )
        if length + len(row) > context:
            raise UserError(f"a text of {length + len(row)} tokens: the model's context is {context}")
