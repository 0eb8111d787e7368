"""Muon's Newton-Schulz iterations for a stack of matrices (csrc/newton_schulz.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet_lit.native import library
from bitnet_lit.native.build import NoCompilerError


def is_available() -> bool:
    """Return whether this process can compute them. The first call may compile the C++."""
    try:
        library.functions()
    except NoCompilerError:
        return False
    return True


def orthogonalize(matrices: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Do what `training.muon.orthogonalize` does: float32 (S, M, N) -> (S, M, N)."""
    matrices = matrices.contiguous()
    result = torch.empty_like(matrices)
    count, rows, columns = matrices.shape
    threads = torch.get_num_threads()
    call = library.NewtonSchulz(
        matrices.data_ptr(), result.data_ptr(), count, rows, columns, steps, threads, *coefficients, eps, library.fork()
    )
    library.functions()["newton_schulz"](call)
    return result
