"""The losses of distillation: a student learns the teacher's distributions beside the text.

The reference is ten lines. `logits_loss` is the Kullback-Leibler divergence between the next-token distributions of
teacher and student, at a temperature (Hinton, Vinyals and Dean, arXiv 1503.02531). `relation_loss` is that between
their attention relations (MiniLMv2, arXiv 2012.15828; BitNet Distillation, arXiv 2510.13998, equations 10 to 12): the
vectors of each position's queries are compared with those of all positions, and so are keys and values. A relation does
not depend on the width of a network.

The logits of all rows, and the relations of all sequences, would be by far the largest tensors of a step. So the fast
path computes chunks of them with their gradients, as model/loss.py does for the cross-entropy, and keeps nothing of
their size.

Axis letters: N tokens (B * T), V vocabulary, R rows of a chunk, B batch, T time, A relation heads, P size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_lit.model.loss import chunks

_COPIES = 4
"""Tensors of the relations' size that are held at once for each network, in float32."""


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 * KL(teacher || student) of each row in nats, float32 (N,).

    Args:
        student, teacher: logits (N, V).
        temperature: T. T^2 makes up for the gradient, which shrinks by it.
    """
    log_q = F.log_softmax(student.float() / temperature, -1)
    log_p = F.log_softmax(teacher.float() / temperature, -1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def relation_loss(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """Return the mean KL(teacher || student) of the relations in nats, over all heads and positions, float32 ().

    Args:
        student, teacher: queries, or keys, or values: (B, T, size) each, of any two sizes that `heads` divides.
        heads: A, in how many vectors of size P each position is cut.
    """

    def log_relation(states: Tensor) -> Tensor:
        x_BATP = states.unflatten(-1, (heads, -1)).transpose(1, 2)
        return F.log_softmax((x_BATP @ x_BATP.mT).float() / x_BATP.shape[-1] ** 0.5, -1)

    divergence = F.kl_div(log_relation(student), log_relation(teacher), reduction="none", log_target=True)
    return divergence.sum(-1).mean()


class DistillationGradient(nn.Module):
    """Maps chunks of logits to the losses and their gradient. It is a module so that it can be compiled."""

    def __init__(self, cross_entropy_weight: float, logits_weight: float, temperature: float) -> None:
        super().__init__()
        self.cross_entropy_weight, self.logits_weight = cross_entropy_weight, logits_weight
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the cross-entropies and the `logits_loss` in nats, float32 (R,), and the gradient of their sum.

        The gradient, (R, V) in the dtype of the student's logits, is of the weighted sum of both, times `scale`.

        Args:
            student, teacher: logits (R, V).
            targets: int64 (R,).
        """
        values, temperature = student.float(), self.temperature
        log_q = F.log_softmax(values, -1)
        cross_entropies = -log_q.gather(-1, targets[:, None]).squeeze(-1)
        is_target = torch.arange(values.shape[1], device=values.device) == targets[:, None]
        gradient = self.cross_entropy_weight * (log_q.exp() - is_target.float())
        log_q = F.log_softmax(values / temperature, -1)
        log_p = F.log_softmax(teacher.float() / temperature, -1)
        p = log_p.exp()
        divergences = temperature**2 * (p * (log_p - log_q)).sum(-1)
        gradient = gradient + self.logits_weight * temperature * (log_q.exp() - p)
        return cross_entropies, divergences, (gradient * scale).to(student.dtype)


class _RelationLoss(torch.autograd.Function):
    """Computes the mean divergence, and its gradient with it; see `chunked_relation_loss`."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, heads: int) -> Tensor:
        kind = student.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else student.dtype
        batch, length, _ = student.shape
        s_BATP, t_BATP = (x.to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (student, teacher))
        count = batch * heads * length
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(s_BATP)
        factor = s_BATP.shape[-1] ** -0.5
        for rows in chunks(batch, _COPIES * heads * length * length):
            s, t = s_BATP[rows], t_BATP[rows]
            log_q = F.log_softmax((s @ s.mT).float() * factor, -1)
            log_p = F.log_softmax((t @ t.mT).float() * t.shape[-1] ** -0.5, -1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            # Scores are s @ s.T, so a vector gets a gradient as a row and as a column of them.
            grad_scores = (log_q.exp() - p) * (factor / count)
            gradient[rows] = ((grad_scores + grad_scores.mT).to(dtype) @ s).to(dtype)
        ctx.save_for_backward(gradient.transpose(1, 2).flatten(-2).to(student.dtype))
        return total / count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None, None


def chunked_relation_loss(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """Return `relation_loss` without holding the relations of all sequences. The teacher gets no gradient.

    The result can be differentiated once.
    """
    loss: Tensor = _RelationLoss.apply(student, teacher, heads)
    return loss
