"""Sherry's 3:4 sparsity: of every four neighbouring weights of a row, three are -1 or +1 and one is 0.

Four such weights have 4 positions of the zero and 2**3 signs, so 32 values, which take 5 bits: 1.25 bits a weight.
Free ternary weights take log2(3) = 1.58 bits, and are stored in 2. For a block w of four weights::

    zero      = argmin |w|                   the first one, where several are smallest
    codes     = sign(w), but 0 at `zero`     sign(0) counts as +1, so that a block always has three nonzero codes
    scale     = mean of |w| over all weights whose code is not 0

Each quarter of the weights is 0, where absmean makes a third of normally distributed weights 0.

Source: Sherry (arXiv 2601.07892) and its code (`NMQuant` in AngelSlim). There, scales are also per row or group,
sign(0) is 0, and training adds a residual path of the latent weights that falls to 0 (Arenas). Here the matrix has one
scale, as in BitNet b1.58, and there is no such path: `quant.lambda_warmup_steps` mixes latent and rounded weights.

Like weights.py, this module does not import torch. Axis letters: O out_features, I in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitnet_lit.quant.activations import SCALE_MIN
from bitnet_lit.quant.weights import Granularity, PerTensor, WeightRule, matrix_mean

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4
"""Neighbouring inputs of a row of which one has the code 0."""


@dataclass(frozen=True)
class ThreeOfFour(WeightRule):
    """This rule makes the smallest of four neighbouring weights 0, and rounds the others to their sign."""

    levels = (-1, 0, 1)

    @property
    def granularity(self) -> Granularity:
        """One scale for the matrix."""
        return PerTensor()

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        blocks = weight.float().unflatten(1, (-1, BLOCK))  # (O, I) -> (O, I / 4, 4)
        magnitude = blocks.abs()
        codes = ((blocks >= 0).float() * 2 - 1).scatter(-1, magnitude.argmin(-1, keepdim=True), 0.0)
        # A sum less its smallest term: NaN stays NaN, so a run that diverged is seen as one.
        kept = magnitude.sum(-1) - magnitude.amin(-1)
        return codes.flatten(1), (matrix_mean(kept) / (BLOCK - 1)).clamp(min=SCALE_MIN)
