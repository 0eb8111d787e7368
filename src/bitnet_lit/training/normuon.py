"""NorMuon gives every neuron an update of about the same size (Li et al. 2025, arXiv 2510.05491, algorithm 1).

Muon's orthogonalized update O (M, N) has singular values near 1, but its rows have different norms: some neurons move
much further than others. NorMuon keeps a running mean v of the mean square of each row, as Adam does for each element,
divides each row by its root, and scales the whole matrix to the norm that O had::

    v      <- beta2 v + (1 - beta2) mean(O**2, over the row)
    O'      = O / (sqrt(v) + 1e-10)
    update  = O' |O| / |O'|

The norm is kept, as in the authors' code, so the learning rate of Muon stays right. v begins at 0 without a correction
of that bias, which would be the same factor for all rows.

A row of a wide matrix (M < N) is one of M orthonormal rows, so its norm is near 1 already, and little changes there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bitnet_lit.training.sharing import local

EPS = 1e-10  # the authors' code


def zero_for_each_row(parameter: Tensor) -> Tensor:
    """Return zeros of the shape (M, 1) for a matrix (M, N), in its dtype and on its device, sharded as it is."""
    zeros = local(parameter).new_zeros(local(parameter).shape[0], 1)
    if not isinstance(parameter, DTensor):
        return zeros
    shape = torch.Size((parameter.shape[0], 1))
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=(1, 1)
    )


def row_factors(
    updates: Sequence[Tensor],
    moments: Sequence[Tensor],
    beta2: float,
    columns: int,
    total: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Return by what NorMuon multiplies each row of orthogonalized updates, and move the running means.

    Args:
        updates: matrices of one shape, or the rows of them that this rank holds.
        moments: the running mean of each row's squares, (rows, 1) in the dtype of the parameter; changed in place.
        beta2: its decay.
        columns: N, the elements of a row.
        total: maps sums over the rows that this rank holds to sums over whole matrices.

    Returns:
        float32 (rows, 1) for each update.
    """
    norms = [torch.linalg.vector_norm(update, dim=1, keepdim=True, dtype=torch.float32) for update in updates]
    squares_SM1 = torch.stack(norms).square()
    means_SM1 = torch.stack(list(moments)).float().lerp(squares_SM1 / columns, 1 - beta2)
    torch._foreach_copy_(list(moments), list(means_SM1.unbind()))
    scales_SM1 = 1 / (means_SM1.sqrt() + EPS)
    before_S, after_S = total(torch.stack([squares_SM1, squares_SM1 * scales_SM1.square()]).sum(dim=(2, 3)))
    kept_S = before_S.sqrt() / (after_S.sqrt() + EPS)
    return list((scales_SM1 * kept_S[:, None, None]).unbind())
