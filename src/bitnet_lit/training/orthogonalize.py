"""Newton-Schulz iterations bring the singular values of a matrix near to 1, and keep its singular vectors.

With the singular value decomposition U S V^T of a matrix, the result is close to U V^T, the nearest (semi-)orthogonal
matrix, from matrix products alone. Each iteration applies the odd polynomial a x + b x^3 + c x^5 to the singular values
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor


def orthogonalize(matrices: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of matrices near to 1 by Newton-Schulz iterations, and keep their singular vectors.

    Args:
        matrices: one matrix (M, N) or a stack (S, M, N); its dtype is that of the computation and of the result.
        coefficients: of the polynomial a x + b x^3 + c x^5 that each iteration applies to the singular values.
        steps: number of iterations, 1 or more.
        eps: smallest norm to divide by.

    Returns:
        The shape of `matrices`.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # so that the Gram matrix is the smaller one
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    if matrices.ndim == 2:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if is_tall else x
    x = x.contiguous()
    for _ in range(steps - 1):
        x = _polynomial(x, coefficients) @ x
    polynomial = _polynomial(x, coefficients)  # symmetric
    return x.mT @ polynomial if is_tall else polynomial @ x


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return a I + b G + c G @ G for the Gram matrices G = x @ x.T of a stack (S, M, N)."""
    if x.is_cuda and find_spec("triton") is not None:
        from bitnet_lit.training import symmetric_product

        if symmetric_product.fits(x):
            return symmetric_product.newton_schulz_polynomial(x, coefficients)
    a, b, c = coefficients
    gram = x @ x.mT
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    polynomial.diagonal(dim1=-2, dim2=-1).add_(a)  # a whole addend would be copied before the product
    return polynomial
