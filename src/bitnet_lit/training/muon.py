"""Muon moves every direction of a hidden matrix at the same rate.

It keeps the momentum of each matrix, as SGD does, and replaces it by the nearest (semi-)orthogonal matrix before the
step (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). With the singular value decomposition U S V^T of
the momentum, the update is close to U V^T. Newton-Schulz iterations compute it from matrix products alone: each one
applies the odd polynomial a x + b x^3 + c x^5 to the singular values, which brings them near to 1.

The products are what Muon costs. A matrix (M, N), M <= N, takes 4 M^2 N + 2 M^3 FLOPs an iteration. So this class
orthogonalizes all matrices of one shape as a stack, in bfloat16, and shares the matrices among the ranks of a
distributed run (`sharing.py`). A CPU takes the matrices one by one, in bfloat16 if it multiplies such numbers (AVX-512
BF16, AMX) and in float32 otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from bitnet_lit.native import library, newton_schulz
from bitnet_lit.training.cautious_decay import decay_where_agreed
from bitnet_lit.training.normuon import row_factors, zero_for_each_row
from bitnet_lit.training.sharing import Exchange, exchange_for, local

# Elements of a stack on one rank. A stack of 64 Mi elements fills a GPU with work and takes 128 MiB; the copies that
# the products need are as large again.
STACK_ELEMENTS = 2**26


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


def _is_native(parameters: Sequence[nn.Parameter], exchange: Exchange) -> bool:
    """Return whether the C++ for CPUs can do the whole step: float32, and no other rank has a share in it."""
    return (
        type(exchange) is Exchange
        and all(
            parameter.is_cpu and parameter.dtype == torch.float32 and parameter.is_contiguous()
            for parameter in parameters
        )
        and library.is_available()
    )


class Muon(torch.optim.Muon):
    """Runs `torch.optim.Muon` on stacks of matrices, alone, under DDP, or on the shards of FSDP2.

    The state and the options of a parameter group are those of `torch.optim.Muon`, so a checkpoint fits both. The
    numbers differ from its numbers only by rounding.

    As in PyTorch's fused optimizers, a tensor `found_inf` that is 1 (set by the training loop where a gradient is not
    finite) keeps a step from changing the parameters, and the host need not wait to learn it. The momentum is lost.

    Args:
        row_beta2: makes this NorMuon: the decay of the running mean of each row's squares (`normuon.py`). The mean is
            kept as `second_momentum_buffer`, (M, 1), in the state of a matrix (M, N). None is plain Muon.
        is_cautious: whether weight decay acts only where update and weight agree in sign (`cautious_decay.py`).
        options: those of `torch.optim.Muon`.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, params: ParamsT, *, row_beta2: float | None = None, is_cautious: bool = False, **options: Any
    ) -> None:
        super().__init__(params, **options)
        self.row_beta2, self.is_cautious = row_beta2, is_cautious  # not in the groups, which a checkpoint overwrites

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Do one optimizer step. `closure` must be None, because `MuonAdamW` has already called it."""
        assert closure is None
        finish: Callable[[], None] | None = None
        for group in self.param_groups:
            lost: float | Tensor = float(group["lr"]) * group["weight_decay"]
            kept = 1 - (lost if self.found_inf is None else lost * (1 - self.found_inf))
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for parameters in by_shape.values():
                exchange = exchange_for(parameters[0])
                length = max(1, STACK_ELEMENTS // parameters[0].numel()) * exchange.world_size
                for first in range(0, len(parameters), length):
                    before, finish = finish, self._start(group, parameters[first : first + length], exchange, kept)
                    if before is not None:  # the ranks exchanged it while they orthogonalized this stack
                        before()
        if finish is not None:
            finish()

    def _start(
        self, group: dict[str, Any], parameters: list[nn.Parameter], exchange: Exchange, kept: Any
    ) -> Callable[[], None]:
        """Compute the update of parameters of one shape, and return the function that moves them.

        Args:
            kept: what weight decay multiplies parameters by; a float, or a tensor () where there is a `found_inf`.
        """
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            if self.row_beta2 is not None and "second_momentum_buffer" not in state:
                state["second_momentum_buffer"] = zero_for_each_row(parameter)
        rows, columns = parameters[0].shape
        rate = float(group["lr"]) * math.sqrt(max(1.0, rows / columns))
        iterations = group["ns_coefficients"], group["ns_steps"], group["eps"]
        if self.found_inf is None and _is_native(parameters, exchange):
            newton_schulz.muon_step(
                parameters,
                [parameter.grad for parameter in parameters if parameter.grad is not None],
                [state["momentum_buffer"] for state in states],
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                kept=kept,
                rate=rate,
                iterations=iterations,
                row_moments=[state["second_momentum_buffer"] for state in states] if self.row_beta2 is not None else [],
                row_beta2=self.row_beta2 or 0.0,
                is_cautious=self.is_cautious,
            )
            return lambda: None
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        directions = averages = [local(state["momentum_buffer"]) for state in states]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        if group["nesterov"]:
            directions = list(torch._foreach_lerp(gradients, averages, group["momentum"]))

        def orthogonalized(stack: Tensor) -> Tensor:
            if stack.device.type == "cpu" and stack.dtype == torch.float32 and library.is_available():
                updates = newton_schulz.orthogonalize(stack, *iterations)
            elif stack.device.type == "cpu":  # PyTorch gains nothing from a stack there
                updates = torch.stack([orthogonalize(matrix, *iterations) for matrix in stack])
            else:
                updates = orthogonalize(stack, *iterations)
            return updates if self.found_inf is None else torch.where(self.found_inf > 0, 0, updates)

        updates = exchange.start(orthogonalized, directions)

        def finish() -> None:
            shards, moves = [local(parameter) for parameter in parameters], updates()
            if self.is_cautious:
                decay_where_agreed(shards, moves, kept)
            else:
                torch._foreach_mul_(shards, kept)
            if self.row_beta2 is None:
                torch._foreach_add_(shards, moves, alpha=-rate)
                return
            moments = [local(state["second_momentum_buffer"]) for state in states]
            for shard, move, factor in zip(
                shards, moves, row_factors(moves, moments, self.row_beta2, columns, exchange.total), strict=True
            ):
                shard.addcmul_(move, factor, value=-rate)

        return finish
