"""The next-token loss, from logits or straight from hidden states.

The logits of a batch are by far its largest tensor: 32,768 tokens and a vocabulary of 32,000 take 2.1 GB in bfloat16,
and the softmax, its gradient and their float32 copies take that several times more. `linear_cross_entropy` never holds
them all. It takes some rows at a time, computes their logits, their losses and at once the gradient of the mean loss:

    logits = hidden @ weight.T
    loss   = mean(logsumexp(logits) - logits[target])
    d loss / d logits = (softmax(logits) - onehot(target)) / N

From that gradient follow those of `hidden` and `weight`, so nothing of the size of the logits is kept for the backward
pass, which only multiplies them by the gradient of the loss. (Wijmans et al., arXiv 2411.09009, and Liger Kernel, arXiv
2410.10989, compute the same sums in kernels of their own.)

Axis letters: N tokens (B * T), D hidden, V vocabulary, R the rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_lit.quant.kernels.triton.kernels import computes

CHUNK_ELEMENTS = 2**28  # of the logits held at once: 0.5 GiB in bfloat16


def next_token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross entropy in nats, computed in float32.

    Args:
        logits: (B, T, V).
        targets: int64 (B, T).
        reduction: "mean" or "sum" over all tokens; "none" returns one number for each, (B * T,).
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


class SoftmaxGradient(nn.Module):
    """Maps a chunk of logits to losses and to the gradient of their sum. It is a module so that it can be compiled.

    On a GPU of the Hopper generation a kernel computes them (quant/kernels/triton/softmax_gradient.py).

    Attributes:
        kernel: the run's `quant.kernel`.
    """

    kernel: str = "auto"

    def forward(self, logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return the losses in nats, float32 (R,), and scale * (softmax - onehot) in the dtype of the logits, (R, V).

        Args:
            logits: (R, V).
            targets: int64 (R,).
        """
        if computes(logits, self.kernel):
            from bitnet_lit.quant.kernels.triton.softmax_gradient import softmax_gradient

            found: tuple[Tensor, Tensor] = softmax_gradient(logits.contiguous(), targets.contiguous(), scale)
            return found
        values = logits.float()
        log_sum = values.logsumexp(-1, keepdim=True)
        is_target = torch.arange(values.shape[1], device=values.device) == targets[:, None]
        losses = (log_sum - values.gather(-1, targets[:, None])).squeeze(-1)
        gradient = ((values - log_sum).exp() - is_target.float()) * scale
        return losses, gradient.to(logits.dtype)


class TokenLosses(nn.Module):
    """Maps logits to losses and hits. It is a module so that it can be compiled."""

    def forward(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses in nats, float32 (N,), and whether each target had the largest logit, bool (N,).

        Args:
            logits: (N, V).
            targets: int64 (N,).
        """
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return losses, logits.argmax(-1) == targets


LogitsGradient = Callable[[Tensor, slice, float], tuple[Tensor, Tensor]]
"""Maps logits (R, V), the rows that they belong to, and a scale to the losses, float32 (R,), and to the scaled gradient
of their sum, (R, V) in the dtype of the logits."""


def chunks(num_rows: int, elements: int) -> list[slice]:
    """Return slices of equally many rows, of at most `CHUNK_ELEMENTS` elements each; without rows, an empty slice.

    Args:
        elements: of a row, which are held at once: the size of the vocabulary.
    """
    if num_rows == 0:
        return [slice(0, 0)]
    count = min(num_rows, -(-num_rows * elements // CHUNK_ELEMENTS))
    rows = -(-num_rows // count)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the dtype in which F.linear would multiply them: autocast's, where it is on."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return hidden.to(dtype), weight.to(dtype)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return total + a @ b in `dtype`, written to `total` where there is one; a product is not rounded before."""
    if a.dtype == dtype or not a.is_cuda or torch.version.hip is not None:
        product = (a @ b).to(dtype)
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.addmm(total, a, b, out_dtype=dtype, out=total)


class _LinearLoss(torch.autograd.Function):
    """Computes the mean loss, and its gradients with it; see `linear_loss`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, gradient_of: LogitsGradient) -> Tensor:
        hidden_ND, weight_VD = _operands(hidden, weight)
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight: Tensor | None = None
        scale = 1.0 / len(hidden) if len(hidden) else math.nan  # the mean of nothing, as in F.cross_entropy
        for rows in chunks(len(hidden), len(weight)):
            logits_RV = hidden_ND[rows] @ weight_VD.T
            losses, grad_logits_RV = gradient_of(logits_RV, rows, scale)
            del logits_RV
            loss += losses.sum()
            torch.mm(grad_logits_RV, weight_VD, out=grad_hidden[rows])
            grad_weight = _add_product(grad_weight, grad_logits_RV.T, hidden_ND[rows], weight.dtype)
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight)
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_outputs[0], grad_weight * grad_outputs[0], None


def linear_loss(hidden: Tensor, weight: Tensor, gradient_of: LogitsGradient) -> Tensor:
    """Return the mean over rows of a loss of the logits hidden @ weight.T without holding all logits, float32 ().

    The result can be differentiated once.

    Args:
        hidden: float (N, D).
        weight: float (V, D).
        gradient_of: computes the losses of a chunk of rows, and their gradient.
    """
    loss: Tensor = _LinearLoss.apply(hidden, weight, gradient_of)  # type: ignore[no-untyped-call]
    return loss


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softmax_gradient: SoftmaxGradient | None = None
) -> Tensor:
    """Return the mean of `next_token_loss(hidden @ weight.T, targets)`; see `linear_loss`.

    Args:
        hidden: float (N, D).
        weight: float (V, D).
        targets: int64 (N,), from 0 to V - 1: there is no number that leaves a row out.
        softmax_gradient: the module to use; it may be compiled.
    """
    chosen = softmax_gradient or SoftmaxGradient()
    return linear_loss(hidden, weight, lambda logits, rows, scale: chosen(logits, targets[rows], scale))


@torch.no_grad()
def linear_token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_losses: TokenLosses | None = None
) -> tuple[Tensor, Tensor]:
    """Return `TokenLosses` of the logits hidden @ weight.T without holding them. It has no gradient.

    The arguments are those of `linear_cross_entropy`.
    """
    chosen = token_losses or TokenLosses()
    hidden_ND, weight_VD = _operands(hidden, weight)
    parts = [chosen(hidden_ND[rows] @ weight_VD.T, targets[rows]) for rows in chunks(len(targets), len(weight))]
    losses, hits = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(hits)
