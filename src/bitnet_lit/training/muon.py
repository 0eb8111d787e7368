"""Muon moves every direction of a hidden matrix at the same rate.

It keeps the momentum of each matrix, as SGD does, and replaces it by the nearest (semi-)orthogonal matrix before the
step (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). `orthogonalize.py` says how.

The products are what Muon costs. A matrix (M, N), M <= N, takes 4 M^2 N + 2 M^3 FLOPs an iteration. So this class
orthogonalizes all matrices of one shape as a stack, in bfloat16, and shares the matrices among the ranks of a
distributed run (`sharing.py`). A CPU takes the matrices one by one, in bfloat16 if it multiplies such numbers (AVX-512
BF16, AMX) and in float32 otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from bitnet_lit.native import library, newton_schulz
from bitnet_lit.training.cautious_decay import decay_where_agreed
from bitnet_lit.training.normuon import row_factors, zero_for_each_row
from bitnet_lit.training.orthogonalize import orthogonalize
from bitnet_lit.training.recorded_moves import MOST_ELEMENTS, RecordedMoves
from bitnet_lit.training.sharing import Exchange, exchange_for, local

# Elements of a stack on one rank. A stack of 64 Mi elements fills a GPU with work and takes 128 MiB; the copies that
# the products need are as large again.
STACK_ELEMENTS = 2**26


@dataclass(frozen=True)
class Stack:
    """Is matrices of one shape and one parameter group that are orthogonalized together.

    Attributes:
        group: their parameter group.
        parameters: the matrices, (M, N), each with a gradient.
        states: what the optimizer keeps for each.
        exchange: how ranks share the work on them.
    """

    group: dict[str, Any]
    parameters: list[nn.Parameter]
    states: list[dict[str, Any]]
    exchange: Exchange

    @property
    def gradients(self) -> list[Tensor]:
        """Return the gradients of the matrices."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def buffers(self, name: str) -> list[Tensor]:
        """Return one of the tensors that the optimizer keeps, of each matrix."""
        return [state[name] for state in self.states]


class Moves(NamedTuple):
    """Says how far the matrices of a stack move, for a learning rate of 1.

    Attributes:
        updates: (M, N) of each matrix, in its dtype or in one that holds more.
        factors: float32 (M, 1) by which NorMuon multiplies the rows of each update; None without it.
    """

    updates: list[Tensor]
    factors: list[Tensor] | None


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

    Attributes:
        gradients_stay: whether gradients lie where those of the step before lay. The training loop sets it when it
            replays its pass, and then a GPU replays the moves, too (`recorded_moves.py`).
    """

    found_inf: Tensor | None = None
    gradients_stay = False

    def __init__(
        self, params: ParamsT, *, row_beta2: float | None = None, is_cautious: bool = False, **options: Any
    ) -> None:
        super().__init__(params, **options)
        self.row_beta2, self.is_cautious = row_beta2, is_cautious  # not in the groups, which a checkpoint overwrites
        self._recorded: RecordedMoves[list[Moves]] | None = None
        self._read: list[Any] = []  # what the moves of the last step followed from, where they may be recorded

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Do one optimizer step. `closure` must be None, because `MuonAdamW` has already called it."""
        assert closure is None
        stacks = [*self._stacks()]
        if self._may_replay(stacks):
            if self._recorded is None:
                self._recorded = RecordedMoves(lambda: [self._start(stack)() for stack in stacks])
            for stack, moves in zip(stacks, self._recorded.replay(), strict=True):
                self._move(stack, moves)
            return
        self._recorded = None  # its memory is free
        before: tuple[Stack, Callable[[], Moves]] | None = None
        for stack in stacks:
            if self._is_native(stack):
                self._step_natively(stack)
                continue
            started = stack, self._start(stack)
            if before is not None:  # the ranks exchanged its moves while they orthogonalized this stack
                self._move(before[0], before[1]())
            before = started
        if before is not None:
            self._move(before[0], before[1]())

    def forget_recording(self) -> None:
        """Free the memory of recorded moves; those of the next step are computed anew."""
        self._recorded, self._read = None, []

    def _stacks(self) -> Iterator[Stack]:
        """Yield all matrices that have a gradient, and make the states of those that have none yet."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                if self.row_beta2 is not None and "second_momentum_buffer" not in state:
                    state["second_momentum_buffer"] = zero_for_each_row(parameter)
            for parameters in by_shape.values():
                exchange = exchange_for(parameters[0])
                length = max(1, STACK_ELEMENTS // parameters[0].numel()) * exchange.world_size
                for first in range(0, len(parameters), length):
                    some = parameters[first : first + length]
                    yield Stack(group, some, [self.state[parameter] for parameter in some], exchange)

    def _may_replay(self, stacks: list[Stack]) -> bool:
        """Return whether the moves follow from the same tensors and options as at the step before, on one GPU."""
        before, self._read = self._read, []
        matrices = [parameter for stack in stacks for parameter in stack.parameters]
        if (
            not self.gradients_stay
            or sum(parameter.numel() for parameter in matrices) > MOST_ELEMENTS
            or not all(parameter.is_cuda for parameter in matrices)
            or any(type(stack.exchange) is not Exchange for stack in stacks)
        ):
            return False
        if self.found_inf is not None:
            self._read.append(self.found_inf.data_ptr())
        for stack in stacks:
            self._read += [stack.group[name] for name in ("momentum", "nesterov", "ns_coefficients", "ns_steps", "eps")]
            self._read += [gradient.data_ptr() for gradient in stack.gradients]
            self._read += [buffer.data_ptr() for state in stack.states for buffer in state.values()]
        return self._read == before

    def _kept_by_decay(self, group: dict[str, Any]) -> Any:
        """Return what weight decay multiplies weights by: a float, or a tensor () where there is a `found_inf`."""
        lost = float(group["lr"]) * group["weight_decay"]
        return 1 - (lost if self.found_inf is None else lost * (1 - self.found_inf))

    @staticmethod
    def _rate(stack: Stack) -> float:
        rows, columns = stack.parameters[0].shape
        return float(stack.group["lr"]) * math.sqrt(max(1.0, rows / columns))

    def _is_native(self, stack: Stack) -> bool:
        """Return whether the C++ for CPUs can do the whole step: float32, and no other rank has a share in it."""
        return (
            self.found_inf is None
            and type(stack.exchange) is Exchange
            and all(
                parameter.is_cpu and parameter.dtype == torch.float32 and parameter.is_contiguous()
                for parameter in stack.parameters
            )
            and library.is_available()
        )

    def _step_natively(self, stack: Stack) -> None:
        group = stack.group
        newton_schulz.muon_step(
            stack.parameters,
            stack.gradients,
            stack.buffers("momentum_buffer"),
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            kept=self._kept_by_decay(group),
            rate=self._rate(stack),
            iterations=(group["ns_coefficients"], group["ns_steps"], group["eps"]),
            row_moments=stack.buffers("second_momentum_buffer") if self.row_beta2 is not None else [],
            row_beta2=self.row_beta2 or 0.0,
            is_cautious=self.is_cautious,
        )

    def _start(self, stack: Stack) -> Callable[[], Moves]:
        """Move the momentum, orthogonalize it, and return the function that returns the moves."""
        group = stack.group
        iterations = group["ns_coefficients"], group["ns_steps"], group["eps"]
        gradients = [local(gradient) for gradient in stack.gradients]
        directions = averages = [local(average) for average in stack.buffers("momentum_buffer")]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        if group["nesterov"]:
            directions = list(torch._foreach_lerp(gradients, averages, group["momentum"]))

        def orthogonalized(matrices: Tensor) -> Tensor:
            if matrices.device.type == "cpu" and matrices.dtype == torch.float32 and library.is_available():
                updates = newton_schulz.orthogonalize(matrices, *iterations)
            elif matrices.device.type == "cpu":  # PyTorch gains nothing from a stack there
                updates = torch.stack([orthogonalize(matrix, *iterations) for matrix in matrices])
            else:
                updates = orthogonalize(matrices, *iterations)
            return updates if self.found_inf is None else torch.where(self.found_inf > 0, 0, updates)

        results = stack.exchange.start(orthogonalized, directions)

        def moves() -> Moves:
            updates, factors = results(), None
            if self.row_beta2 is not None:
                moments = [local(moment) for moment in stack.buffers("second_momentum_buffer")]
                columns = stack.parameters[0].shape[1]
                factors = row_factors(updates, moments, self.row_beta2, columns, stack.exchange.total)
            return Moves(_promoted(updates, directions[0].dtype), factors)

        return moves

    def _move(self, stack: Stack, moves: Moves) -> None:
        """Move the matrices of a stack, by the learning rate and weight decay of this step."""
        weights = [local(parameter) for parameter in stack.parameters]
        kept, rate = self._kept_by_decay(stack.group), self._rate(stack)
        if self.is_cautious:
            decay_where_agreed(weights, moves.updates, kept)
        else:
            torch._foreach_mul_(weights, kept)
        if moves.factors is None:
            torch._foreach_add_(weights, moves.updates, alpha=-rate)
            return
        for weight, update, factor in zip(weights, moves.updates, moves.factors, strict=True):
            weight.addcmul_(update, factor, value=-rate)


def _promoted(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors in a dtype, or in their own where that holds more.

    PyTorch adds lists of one dtype in a few kernels, and lists of two in one kernel for each pair.
    """
    promoted = torch.promote_types(tensors[0].dtype, dtype)
    if promoted == tensors[0].dtype:
        return tensors
    copies = [torch.empty_like(tensor, dtype=promoted) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies
