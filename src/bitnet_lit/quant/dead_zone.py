"""Tequila uses the weights that are rounded to 0 as a bias.

Absmean rounds a third of the weights to 0. Such a weight multiplies its input by 0, so the loss does not depend on it,
and the straight-through gradient that it gets is the gradient of another weight, one that is not 0. Tequila calls this
the dead zone. There it lets each weight add a small constant to the output instead::

    y_o = BitLinear(x)_o + factor * sum of w_oi over the inputs i whose code is 0

This term has a true gradient, `factor` times that of y_o, and so says in which direction the weight should leave the
zone. For trained weights it is one constant for each output: a bias.

Source: Tequila (arXiv 2509.23809), Y = X Q(W) + C(W) with factor 1e-3, and its code (`UltraQuantV2` in AngelSlim). The
code has other variants, among them a factor for each weight that is trained; the one here is the plainest.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bitnet_lit.quant.bit_linear import BitLinear


class DeadZoneLinear(BitLinear):
    """A DeadZoneLinear is a BitLinear with a bias that is computed from the weights whose code is 0."""

    def dead_zone_bias(self) -> Tensor:
        """Return the bias, float, shape (O,). Its gradient goes to the weights."""
        with torch.no_grad():
            codes, _ = self.quantized_weight()
        factor: float = cast(Any, self.scheme).bias_factor
        return factor * (self.weight * (codes == 0)).sum(dim=1)

    def forward(self, input: Tensor) -> Tensor:
        y, bias = super().forward(input), self.dead_zone_bias()
        return y + (bias if self.strength is None else self.strength * bias).to(y.dtype)
