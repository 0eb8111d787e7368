"""Scales that are trained: the scale of absmean times a gain, which starts at 1 and has LSQ's gradient.

BitNet b1.58 computes the scale of a matrix from its weights. So the size of what a layer puts out is tied to the size
of its latent weights, and the optimizer's step and weight decay decide about that more than the data. Here a gain
frees it. It belongs to a matrix or to each row::

    scale  = gain * mean(|w|)                       gain starts at 1, where this is b1.58
    codes  = clamp(round(w / scale), -1, 1)         as in b1.58
    weight ~= codes * scale

A larger gain makes more weights 0, and the others larger. The gradient of a rounded weight by the scale is that of LSQ,
in which rounding counts as the identity and clamping does not::

    d(codes * scale) / d(scale) = codes - w / scale    where |w / scale| <= 1
                                = codes                where the weight is clamped

and the gradient of the scale is divided by sqrt(number of weights that share it). The gradient of the latent weight
stays b1.58's, which is straight-through for clamped weights too: LSQ's is 0 there, and of normally distributed weights
two in five are clamped.

LSQ (Esser and others, arXiv 1902.08153) trains the scale itself. A gain differs only in its unit: a learning rate that
fits other vectors of a network fits it too. ParetoQ (arXiv 2502.02631) trains ternary models with learned scales for
each row, and "Learnable Multipliers" (Falcon, arXiv 2601.04890) dense ones with gains of matrices and rows.

Formats and engines get codes and scales, and never see the gain. Like weights.py, this module does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitnet_lit.quant.activations import SCALE_MIN
from bitnet_lit.quant.weights import Granularity, Ternary, WeightRule, spread_scale

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LearnedScale(Ternary):
    """This rule multiplies the scales of another rule by a gain.

    Attributes:
        base: gives the scales that are multiplied.
        gain: float, (1,) or (O, 1), one for each scale; None counts as 1.
    """

    base: WeightRule
    gain: Tensor | None = None

    @property
    def granularity(self) -> Granularity:
        """That of the other rule."""
        return self.base.granularity

    def scale(self, weight: Tensor) -> Tensor:
        """See `WeightRule`."""
        return self.base.scale(weight) if self.gain is None else self.scale_with(weight, self.gain)

    def scale_with(self, weight: Tensor, gain: Tensor) -> Tensor:
        """Return the scales for a given gain, which need not be that of the rule."""
        scale = self.base.scale(weight)
        return (scale * gain.reshape(scale.shape)).clamp(min=SCALE_MIN)

    def statistics(self, weight: Tensor) -> None:
        """None: the gain is a third number."""
        return None

    def slope(self, weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """Return the derivative of rounded weights by the gain, as LSQ has it; float32 (O, I).

        Args:
            weight: latent weight, (O, I).
            codes, scale: what `quantize` returns for it.
        """
        scaled = weight.float() / spread_scale(scale, weight.shape[1])
        by_scale = (codes - scaled).where(scaled.abs() <= 1, codes)
        weights_of_a_scale = weight.numel() / scale.numel()
        return by_scale * self.base.scale(weight) / math.sqrt(weights_of_a_scale)
