"""The losses of a chunk of logits and their gradient, in two passes over each row.

The first pass sums the exponentials of a row, the second writes the gradient::

    loss     = logsumexp(logits) - logits[target]
    gradient = scale * (exp(logits - logsumexp(logits)) - onehot(target))

A lane of a program has its own columns: the largest logit that it met, and the sum of exponentials relative to that one
(the online softmax of Milakov and Gimelshein, arXiv 1805.02867). Of `exp(old - new)` and `exp(logit - new)` one is
always 1, so each logit costs one exponential. The lanes' sums are put together once a row.

A row of 32,000 logits does not fit into the registers of a program that leaves room for others. It is read twice, and
the second time comes partly from the L2 cache: the first pass asks to keep it there, the second to drop it. 8,192 rows
of that length in bfloat16 took 345 us on an H200. The kernel of PyTorch's compiler took 521, and a copy of them 253.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_lit.quant.kernels.triton.launch import on_device_of, operator

MINUS_INFINITY = tl.constexpr(float("-inf"))
BELOW_ALL = tl.constexpr(-3.4e38)
"""It stands for the largest of no logits: the difference of two infinities would be NaN."""


@triton.jit
def _softmax_gradient(logits_ptr, targets_ptr, losses_ptr, gradient_ptr, V, scale, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    start = row.to(tl.int64) * V
    largest = tl.full((COLUMNS,), BELOW_ALL, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        at = logits_ptr + start + column
        logits = tl.load(at, mask=column < V, other=MINUS_INFINITY, eviction_policy="evict_last").to(tl.float32)
        above = logits - largest
        exponential = tl.exp(-tl.abs(above))
        total = tl.where(above > 0, total * exponential + 1.0, total + exponential)
        largest = tl.maximum(largest, logits)
    row_largest = tl.max(largest)
    log_sum = tl.log(tl.sum(total * tl.exp(largest - row_largest))) + row_largest

    target = tl.load(targets_ptr + row)
    is_token = (target >= 0) & (target < V)  # a loss of NaN stops a run; memory beyond the row would give any number
    chosen = tl.load(logits_ptr + start + target, mask=is_token, other=float("nan")).to(tl.float32)
    tl.store(losses_ptr + row, log_sum - chosen)

    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        at = logits_ptr + start + column
        logits = tl.load(at, mask=column < V, other=MINUS_INFINITY, eviction_policy="evict_first").to(tl.float32)
        gradient = tl.exp(logits - log_sum) * scale
        gradient = tl.where(column == target.to(tl.int32), gradient - scale, gradient)
        at = gradient_ptr + start + column
        tl.store(at, gradient.to(gradient_ptr.dtype.element_ty), mask=column < V, cache_modifier=".cs")


def _softmax_gradient_fake(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return logits.new_empty((logits.shape[0],), dtype=torch.float32), torch.empty_like(logits)


@operator(_softmax_gradient_fake)
def softmax_gradient(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute what `model.loss.SoftmaxGradient` does.

    Args:
        logits: float (R, V), contiguous.
        targets: int64 (R,). A number that is no column has a loss of NaN.
        scale: by which the gradient is multiplied.

    Returns:
        losses: float32 (R,), in nats.
        gradient: (R, V) in the dtype of the logits.
    """
    rows, vocabulary = logits.shape
    losses = logits.new_empty((rows,), dtype=torch.float32)
    gradient = torch.empty_like(logits)
    columns, num_warps = (1024, 4) if vocabulary <= 8192 else (4096, 16)  # as measured on an H200
    with on_device_of(logits):
        _softmax_gradient[(rows,)](
            logits, targets, losses, gradient, vocabulary, scale, COLUMNS=columns, num_warps=num_warps
        )
    return losses, gradient
