"""A norm and the linear layers that read its output are called together, so that kernels can compute them together.

Kernels then compute the norm, the rounding of activations and the products in fewer passes over memory. Larger parts of
a layer (attention, the feed-forward) ask for their kernels here too. Where there are none, each module is called by
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_lit.quant.bit_linear import BitLinear
from bitnet_lit.quant.kernels.choose import are_alike, are_unobserved, chosen
from bitnet_lit.quant.kernels.interface import Kernels, Norm


class RMSNorm(nn.Module):
    """RMSNorm is x / sqrt(mean(x**2) + eps) * weight, computed in float32 and returned in the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def as_norm(norm: nn.Module) -> Norm | None:
    """Return an RMSNorm as kernels take it, and None for an Identity."""
    return Norm(norm.weight, norm.eps) if isinstance(norm, RMSNorm) else None


def joint_kernels(x: Tensor, norms: Sequence[nn.Module], linears: Sequence[nn.Module]) -> Kernels | None:
    """Return the kernels that compute the norms and the linear layers together, or None where there are none.

    Kernels know RMSNorm alone. A norm of another class is called as it is.
    """
    if any(type(norm) not in (RMSNorm, nn.Identity) for norm in norms):
        return None
    if not are_alike(linears) or not are_unobserved([*norms, *linears]):
        return None
    return chosen(cast(list[BitLinear], linears), x)


def normed_linears(x: Tensor, norm: nn.Module, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Return linear(norm(x)) of each linear layer; x (B..., I) -> (B..., O) each.

    Args:
        norm: an RMSNorm, or an Identity where there is no norm.
    """
    if (kernels := joint_kernels(x, [norm], linears)) is not None:
        return kernels.normed_linears(x, as_norm(norm), cast(list[BitLinear], linears))
    x = norm(x)
    return tuple(linear(x) for linear in linears)
