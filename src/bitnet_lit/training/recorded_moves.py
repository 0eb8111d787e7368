"""A CUDA graph replays what Muon computes from the gradients: how far each matrix moves, for a learning rate of 1.

To orthogonalize the matrices of one shape takes about 30 kernels, and the matrices of a small network are done with
each within microseconds. Starting a kernel from Python takes longer, so the GPU would wait for the host. With a network
of 5.6 M parameters whose pass is replayed (cuda_graph.py), the host started 117 kernels a step, and 41 with this graph
(docs/speed.md).

What depends on the step is left out: the learning rate and weight decay, which the host knows, scale the moves later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

MOST_ELEMENTS = 2**26
"""Elements of all matrices together up to which they are recorded. A graph keeps the memory of its work, more than ten
bytes an element, and the kernels of larger matrices take longer than their start."""


class RecordedMoves(Generic[T]):
    """Records a computation of the current GPU, which is not done yet, and replays it.

    It has a stream of its own, because products take their workspace by the stream (cuda_graph.py).

    Args:
        compute: has run before, so its kernels are compiled and chosen. The tensors that it reads may get other values,
            but no other place.
    """

    def __init__(self, compute: Callable[[], T]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # The thread that reads batches goes on with its own CUDA calls meanwhile.
        with torch.cuda.graph(self._graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            self._result = compute()

    def replay(self) -> T:
        """Compute, and return the result, which the next call overwrites."""
        self._graph.replay()
        return self._result
