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
from bitnet_lit.quant.kernels.triton.kernels import computes


class RMSNorm(nn.Module):
    """RMSNorm is x / sqrt(mean(x**2) + eps) * weight, computed in float32 and returned in the dtype of x.

    Args:
        follows_attention: whether attention returned x. Its backward pass is a call of a library, so the compiler has
            nothing to put the norm's backward pass into. A kernel computes that pass on GPUs (norm_backward.py).

    Attributes:
        kernel: the run's `quant.kernel`.
    """

    kernel: str = "auto"

    def __init__(self, size: int, eps: float, follows_attention: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.follows_attention = follows_attention

    def forward(self, x: Tensor) -> Tensor:
        if self.follows_attention and torch.is_grad_enabled() and computes(x, self.kernel):
            from bitnet_lit.quant.kernels.triton.norm_backward import FASTER_FROM, LARGEST_ROW, RMSNormFunction

            if FASTER_FROM <= x.shape[-1] <= LARGEST_ROW:
                y: Tensor = RMSNormFunction.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
                return y
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
