"""Embeddings are quantized here to Q6_K of llama.cpp, which takes 6.56 bits per weight.

A block holds 256 weights in sixteen groups of 16. Each group has an 8-bit scale, and the block has one fp16 factor d::

    weight ~= d * scale[group] * q        q in -32..31, stored as q + 32

A block is stored as 210 bytes (ggml-common.h, block_q6_K): the low 4 bits of q (128), the high 2 bits (64), the scales
(16), and d (2).
Within each half of 128 weights, byte l of the low bits holds the weights l and l + 64, and byte l of the high bits the
weights l, l + 32, l + 64 and l + 96.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK, GROUP = 256, 16


def quantize_q6_k(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Quantize rows to blocks of Q6_K: float32 (R, I), I a multiple of 256 -> uint8 (R, I / 256 * 210)."""
    groups = rows.reshape(-1, BLOCK // GROUP, GROUP)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    opposite = (groups * -np.sign(largest)).max(-1, keepdims=True)
    # The largest magnitude becomes -32. On the other side the last code is 31, which rounding gives up to 31.5 steps.
    scale = np.copysign(np.maximum(np.abs(largest) / 32, opposite / 31.5), -largest)
    top = np.take_along_axis(scale, np.abs(scale).argmax(1, keepdims=True), 1)
    exact = top / -127.5  # likewise: the 8-bit scales are -128..127
    d = exact.astype(np.float16)
    # Round away from zero: a d that is too small would clip the largest scale.
    d = np.where(np.abs(d) < np.abs(exact), np.nextafter(d, np.copysign(np.float16(np.inf), d)), d)
    wide = d.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes_of_scales = np.where(wide == 0, 0, np.clip(np.rint(scale / wide), -128, 127))
        step = wide * codes_of_scales
        q = np.where(step == 0, 0, np.clip(np.rint(groups / step), -32, 31))
    q = (q + 32).astype(np.uint8).reshape(-1, 2, 4, 32)  # block, half, quarter, l
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4
    high = q[:, :, 0] >> 4 | q[:, :, 1] >> 4 << 2 | q[:, :, 2] >> 4 << 4 | q[:, :, 3] >> 4 << 6
    parts = (
        low.reshape(-1, 128),
        high.reshape(-1, 64),
        codes_of_scales.astype(np.int8).view(np.uint8).reshape(-1, 16),
        d.reshape(-1, 1).view(np.uint8),
    )
    return np.concatenate(parts, axis=1).reshape(len(rows), -1)
