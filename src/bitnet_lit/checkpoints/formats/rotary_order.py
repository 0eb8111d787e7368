"""The order of the rows that rotary positions turn: two conventions, and the way from one to the other.

Hugging Face, and so our tensors, turn the pairs (i, i + P/2) of a head of P elements; llama2.c and llama.cpp's llama
graph turn (2i, 2i + 1). The same network in the other convention has the rows of q and k, and whatever else belongs to
them, in another order (`rotary_heads` in model/tensors.py says which tensors these are).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def interleave(rows: Tensor, heads: int | None) -> Tensor:
    """Rows (O, ...) from Hugging Face's order to that of neighbouring pairs; heads None: left as they are."""
    if heads is None:
        return rows
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def deinterleave(rows: Tensor, heads: int | None) -> Tensor:
    """The inverse of `interleave`."""
    if heads is None:
        return rows
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
