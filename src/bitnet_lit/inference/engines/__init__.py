"""Engines compute logits from token ids; everything above them is engine-agnostic.

What a text has behind it lies in a cache of its own, so one engine serves many texts, and several of them in one step:
they share one pass over the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


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

        Returns:
            Logits of the token after each text: float32 (len(ids), V).
        """
