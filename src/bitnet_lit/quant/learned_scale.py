"""Scales that are trained: the scale of absmean times a gain, which starts at 1.

BitNet b1.58 computes the scale of a matrix from its weights. So the size of what a layer puts out is tied to the size
of its latent weights, and the optimizer's steps and weight decay decide about that more than the data. A gain frees it.
It belongs to a matrix or to each row::

    codes  = clamp(round(w / mean(|w|)), -1, 1)     as in b1.58
    scale  = gain * mean(|w|)                       weight ~= codes * scale

The layer computes gain * BitLinear(x), and the gradients are those of this product. The gradient of the gain alone is
divided by the square root of the number of weights that share the scale, as LSQ does: a sum over a whole matrix would
otherwise fill the norm by which gradients are clipped.

"Learnable Multipliers" (Falcon, arXiv 2601.04890) trains dense models with such gains of matrices and rows, and this is
its simplest case with rounded weights. LSQ (arXiv 1902.08153; for ternary weights ParetoQ, arXiv 2502.02631) trains the
scale itself, which then decides about the codes too, with another gradient. On TinyStories (1.1 M parameters, 300
steps, one seed) the gain came to a loss of 3.224, LSQ's rule to 3.257, and b1.58 to 3.327, so the gain it is.

Formats and engines get codes and scales, and never see the gain. Like weights.py, this module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitnet_lit.quant.weights import Granularity, WeightRule

if TYPE_CHECKING:
    from torch import Tensor

GAIN_MIN = 1e-4
"""Scales are greater than 0, so a gain counts as this where it is smaller. It gets its gradient there, and can grow."""


@dataclass(frozen=True)
class LearnedScale(WeightRule):
    """This rule multiplies the scales of a ternary rule by a gain.

    Attributes:
        base: gives the codes, and the scales that are multiplied.
        gain: float, (1,) or (O, 1), one for each scale; None counts as 1.
    """

    base: WeightRule
    gain: Tensor | None = None

    levels = (-1, 0, 1)

    @property
    def granularity(self) -> Granularity:
        """Return the granularity of the other rule."""
        return self.base.granularity

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = self.base.quantize(weight)
        return codes, scale if self.gain is None else scale * self.gain.reshape(scale.shape).clamp(min=GAIN_MIN)
