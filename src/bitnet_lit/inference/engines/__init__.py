"""Engines compute logits from token ids and remember the past; everything above them is engine-agnostic."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Engine(Protocol):
    """What generation needs of an engine. One instance serves one text at a time."""

    name: str
    """What it is, in a few words."""
    max_length: int
    """The context, in tokens."""

    @property
    def length(self) -> int:
        """Tokens behind it."""

    def reset(self) -> None:
        """Forget the past."""

    def forward(self, ids: list[int]) -> Tensor:
        """Logits of the token after `ids`, which go on from the past: float32 (V,) on the CPU."""
