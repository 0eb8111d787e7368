"""The ranks of a distributed run share the work on whole matrices, and exchange what it needs and gives.

Each rank works on some of the matrices. Under DDP every rank has every matrix. A rank takes its share, and afterwards
all ranks gather all results. Under FSDP2 a rank has some rows of every matrix. It sends the rows of each matrix to the
rank that works on it, and gets back its rows of all results. So each matrix is gathered once, on one rank, for the time
of the work.

The work gets its matrices as a stack. On GPUs the stack is in bfloat16, also while it is exchanged; on CPUs, most of
which have no bfloat16 arithmetic, it is in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")
Work = Callable[[Tensor], Tensor]
Results = Callable[[], list[Tensor]]


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds: its rows of a DTensor, otherwise the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all ranks. Where it is a DTensor, every rank must call this function."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def world_size() -> int:
    """Return the number of ranks that are connected; 1 where the run is not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, which must call this function. Nothing waits for the device."""
    total = value.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size()


def first_of_ranks(value: T | None) -> T | None:
    """Return the value of the first rank that has one. All ranks must call this function, and they wait for it."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return next((value for value in values if value is not None), None)


def work_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the stacks on a device."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _stack(matrices: list[Tensor], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return matrices as a stack of `shape`. Where there are fewer matrices or rows, the rest is zero."""
    is_full = len(matrices) == shape[0] and matrices[0].shape == shape[1:]
    stack = (torch.empty if is_full else torch.zeros)(shape, dtype=work_dtype(device), device=device)
    if matrices:
        rows = matrices[0].shape[0]
        torch._foreach_copy_(list(stack[: len(matrices), :rows].unbind()), matrices)
    return stack


def _when(sent: dist.Work | None, results: Results) -> Results:
    """Return a function that waits for what is sent, on a GPU without the host, and then returns `results()`."""

    def wait() -> list[Tensor]:
        if sent is not None:
            sent.wait()
        return results()

    return wait


@dataclass(frozen=True)
class Exchange:
    """Does the work on matrices of one shape that this process alone has. The subclasses share it among ranks.

    Attributes:
        shape: (M, N), the shape of a whole matrix.
        world_size: number of ranks that share the work.
    """

    shape: tuple[int, int]
    world_size: int = 1

    def start(self, work: Work, matrices: list[Tensor]) -> Results:
        """Do this rank's share of the work, and start to send the results. Other work may run meanwhile.

        Args:
            work: maps a stack (S, M, N) to a stack (S, M, N), each matrix for itself.
            matrices: the matrices, under FSDP2 this rank's rows of them. All are of one dtype, on one device.

        Returns:
            A function that returns for each of `matrices` the result, in the dtype of the stack.
        """
        done = work(_stack(matrices, (len(matrices), *self.shape), matrices[0].device))
        return lambda: list(done.unbind())

    def total(self, sums: Tensor) -> Tensor:
        """Return sums over whole matrices, given the sums over what this rank holds of them."""
        return sums


@dataclass(frozen=True)
class Replicas(Exchange):
    """Shares the work where every rank has every matrix: DDP."""

    def start(self, work: Work, matrices: list[Tensor]) -> Results:
        """See `Exchange`."""
        each = -(-len(matrices) // self.world_size)
        first = each * dist.get_rank()
        done = work(_stack(matrices[first : first + each], (each, *self.shape), matrices[0].device)).contiguous()
        # torch 2.13 has a new name for all_gather_into_tensor, and warns where the old one is called.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gathered = done.new_empty(self.world_size * each, *self.shape)
        return _when(
            all_gather(gathered, done, async_op=done.is_cuda),  # gloo must keep an order
            lambda: list(gathered[: len(matrices)].unbind()),
        )


@dataclass(frozen=True)
class Shards(Exchange):
    """Shares the work where every rank has some rows of every matrix: FSDP2.

    FSDP2 gives each rank ceil(M / world_size) rows, and the last ranks what is left. Here every part is filled up to
    that number of rows, so all ranks exchange the same number of bytes.

    Attributes:
        group: the ranks that hold the rows.
    """

    group: dist.ProcessGroup | None = None

    def start(self, work: Work, matrices: list[Tensor]) -> Results:
        """See `Exchange`."""
        (size, columns), ranks = self.shape, self.world_size
        rows, each = -(-size // ranks), -(-len(matrices) // ranks)
        sent = _stack(matrices, (ranks * each, rows, columns), matrices[0].device)
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=self.group)
        # The first axis of `sent` is (rank, its matrix), that of `got` is (rank, my matrix).
        whole = got.view(ranks, each, rows, columns).transpose(0, 1).reshape(each, ranks * rows, columns)
        whole[:, :size] = work(whole[:, :size])
        sent.view(ranks, each, rows, columns).copy_(whole.view(each, ranks, rows, columns).transpose(0, 1))
        return _when(
            dist.all_to_all_single(got, sent, group=self.group, async_op=got.is_cuda),
            lambda: [result[: part.shape[0]] for result, part in zip(got, matrices, strict=False)],
        )

    def total(self, sums: Tensor) -> Tensor:
        """See `Exchange`. Every rank of the group must call this function."""
        dist.all_reduce(sums, group=self.group)
        return sums


def exchange_for(parameter: Tensor) -> Exchange:
    """Return how the work on matrices like `parameter` is shared."""
    shape = (parameter.shape[0], parameter.shape[1])
    if isinstance(parameter, DTensor):
        group = parameter.device_mesh.get_group()
        return Shards(shape, dist.get_world_size(group), group)
    return Replicas(shape, world_size()) if world_size() > 1 else Exchange(shape)
