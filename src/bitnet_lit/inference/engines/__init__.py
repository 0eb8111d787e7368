"""Engines compute logits from token ids; everything above them is engine-agnostic.

What a text has behind it lies in a cache of its own, so one engine serves many texts, and several of them in one step:
they share one pass over the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.errors import UserError


class Cache(Protocol):
    """The past of one text."""

    @property
    def length(self) -> int:
        """Tokens in it."""

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on."""

    def fork(self) -> Any:
        """A cache of its own with the same past."""


class Engine(Protocol):
    """What generation needs of an engine."""

    name: str
    """What it is, in a few words."""
    max_length: int
    """The context, in tokens."""

    def new_cache(self) -> Any:
        """An empty past; such caches are what `forward` takes."""

    def forward(self, ids: Sequence[Sequence[int]], caches: Sequence[Any]) -> NDArray[np.float32]:
        """Put ids[i], one token or more, to the end of caches[i], each another text.

        Several threads may call it at once, each with caches of its own.

        Returns:
            Logits of the token after each text: float32 (len(ids), V).

        Raises:
            UserError: see `check_step`.
        """


def check_step(ids: Sequence[Sequence[int]], lengths: Sequence[int], vocabulary: int, context: int) -> None:
    """Refuse a step that an engine cannot make: what it would read lies beyond its tables.

    Args:
        ids: new tokens of each text, as for `Engine.forward`.
        lengths: tokens that each text has behind it.
        vocabulary, context: what the model has, in tokens.

    Raises:
        UserError: a text without a token, a token beyond the vocabulary, a text beyond the context.
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
