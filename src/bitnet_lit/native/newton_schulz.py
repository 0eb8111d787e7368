"""Muon's Newton-Schulz iterations, and its whole step, for matrices of one shape (csrc/newton_schulz.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet_lit.native import library


def orthogonalize(matrices: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Do what `training.orthogonalize` does: float32 (S, M, N) -> (S, M, N)."""
    matrices = matrices.contiguous()
    result = torch.empty_like(matrices)
    call = library.NewtonSchulz(matrices.data_ptr(), result.data_ptr(), *matrices.shape, torch.get_num_threads())
    call.iterations, call.fork = library.Iterations(*coefficients, eps, steps), library.fork()
    library.functions()["newton_schulz"](call)
    return result


def muon_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    kept: float,
    rate: float,
    iterations: tuple[Sequence[float], int, float],
    row_moments: Sequence[Tensor] = (),
    row_beta2: float = 0.0,
    is_cautious: bool = False,
) -> None:
    """Do Muon's step for matrices of one shape, contiguous and float32: weights, averages and moments are changed.

    Args:
        averages: of the gradients, with `momentum`.
        kept: the weights are multiplied by it, for weight decay.
        rate: the weights move by -rate times the orthogonalized direction.
        iterations: coefficients, steps and eps, as `orthogonalize` takes them.
        row_moments: of each matrix, the running mean of the squares of each row, (M, 1), with `row_beta2`
            (training/normuon.py); none for plain Muon.
        is_cautious: whether only weights that agree with their update in sign are multiplied by `kept`.
    """
    gradients = [gradient.contiguous() for gradient in gradients]
    pointers = [
        (ctypes.c_void_p * len(parts))(*[part.data_ptr() for part in parts]) if parts else None
        for parts in (weights, gradients, averages, row_moments)
    ]
    coefficients, steps, eps = iterations
    call = library.MuonStep(*pointers, len(weights), *weights[0].shape, torch.get_num_threads(), nesterov, is_cautious)
    call.row_new_share = 1 - row_beta2
    call.momentum, call.new_share, call.kept, call.rate = momentum, 1 - momentum, kept, rate
    call.iterations, call.fork = library.Iterations(*coefficients, eps, steps), library.fork()
    library.functions()["muon_step"](call)
