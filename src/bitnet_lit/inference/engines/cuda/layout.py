"""This is how weights lie in the memory of the GPU.

A model folder packs four rows in a byte (quant/packing.py). The kernels multiply along the inputs of a row, so here the
16 codes of a 32-bit word are 16 inputs of one row. They are not neighbours: the inputs are cut into 16 stretches of T,
and word t holds the t-th input of each. With T words in a row, i = 4 c + b::

    bits 8 b + 2 c of word t     code + 1 of input i T + t       c: plane, 0..3    b: byte, 0..3

A token is rounded to bytes in the same order: byte b of word t of plane c is input (4 c + b) T + t. So T neighbouring
lanes read T neighbouring inputs of the token and of its norm, shift, and have both operands of a four-byte product,
without exchanging anything. Rows are padded with zeros to a multiple of 256 inputs, which makes blocks of 64 bytes, and
long ones to a multiple of 512.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROUND_TO = 256  # inputs: 16 codes in a word, and 16 words in the narrowest block of `matmul`
LONG_ROW = 4096  # inputs from which twice as many are rounded to: `matmul` is faster with the wider block


def words_in_row(inputs: int) -> int:
    """Return T: the 32-bit words of 2-bit codes in a row."""
    round_to = ROUND_TO if inputs < LONG_ROW else 2 * ROUND_TO
    return -(-inputs // round_to) * round_to // 16


def pack_words(codes: Tensor) -> Tensor:
    """Pack codes in {-1, 0, +1}: int8 (N, K) -> int32 (N, T)."""
    T = words_in_row(codes.shape[1])
    pairs = F.pad(codes.to(torch.int8) + 1, (0, 16 * T - codes.shape[1]), value=1).view(-1, 16, T).to(torch.int32)
    words = torch.zeros_like(pairs[:, 0])
    for i in range(16):
        words |= pairs[:, i] << (8 * (i % 4) + 2 * (i // 4))
    return words


def permute_bytes(rows: Tensor) -> Tensor:
    """Put int8 rows (N, K) in the order of a rounded token: int8 (N, 16 T), zeros behind the end."""
    T = words_in_row(rows.shape[1])
    padded = F.pad(rows, (0, 16 * T - rows.shape[1])).view(-1, 4, 4, T)  # N, c, b, t
    return padded.transpose(2, 3).contiguous().view(-1, 16 * T)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of an output head by its largest magnitude: codes int8 (V, D), scales float32 (V,)."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale
