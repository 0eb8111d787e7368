"""Rotary positions rotate pairs of rows of q and k; there are two orders of rows, and they are converted here.

Hugging Face and our network rotate the pairs (i, i + P/2) of a head of P elements. llama2.c and llama.cpp's llama graph
rotate the pairs (2i, 2i + 1). For the same network, the rows of q and k and of other tensors of theirs (such as biases)
are in another order. `rotary_heads` in model/tensors.py says which tensors these are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def interleave(rows: Tensor, heads: int | None) -> Tensor:
    """Reorder rows (O, ...) from Hugging Face's pairs to neighbouring pairs; with heads None, return them unchanged."""
    if heads is None:
        return rows
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def deinterleave(rows: Tensor, heads: int | None) -> Tensor:
    """Reorder rows (O, ...) from neighbouring pairs to Hugging Face's; this is the inverse of `interleave`."""
    if heads is None:
        return rows
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
