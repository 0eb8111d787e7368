"""Decode steps are CUDA graphs.

`Rows` are the places of a batch: each row may have a text. Its tensors stay where they are, so a step is captured
once, and every later one is a single launch that reads the rows' tokens, positions and caches from the GPU. Texts come
and go by what stands in the rows; an empty one has position -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitnet_lit.inference.engines.cuda.cache import CudaCache
from bitnet_lit.inference.engines.cuda.network import BLOCK, Network, Scratch, Texts
from bitnet_lit.inference.engines.cuda.sampling import SamplingState, Variant, sample

MOST_ROWS = 64
"""Texts of one step. More are several steps."""


def round_up(number: int) -> int:
    """Return the smallest power of two that is not less. There is one graph for each, not one for each number."""
    return 1 << (number - 1).bit_length()


class Rows:
    """Is the rows of a batch of one size, and the graphs that run them.

    Attributes:
        size: how many rows, a power of two.
        sampling: what sampling keeps for each row.
    """

    def __init__(self, network: Network, size: int, pool: Any) -> None:
        device = network.device
        self.network, self.size, self._pool = network, size, pool
        self.sampling = SamplingState(size, device)
        self._where = torch.zeros(3, size, dtype=torch.int64, device=device)  # address, room, position
        self._texts = Texts(*self._where)
        self.logits = torch.zeros(size, network.config.vocabulary, dtype=torch.float32, device=device)
        self._graphs: dict[tuple[int, Variant | None], torch.cuda.CUDAGraph] = {}
        self._scratches: dict[int, Scratch] = {}
        self._placed: list[tuple[int, int, int]] = []

    @property
    def position(self) -> Tensor:
        """Return where the next token of each row will stand."""
        return self._texts.position

    def place(self, caches: Sequence[CudaCache | None]) -> None:
        """Say which text stands in each row before a step; None for an empty row.

        Makes room for the new token. Nothing is sent to the GPU where it knows everything already: the positions that
        it counted up itself.

        Raises:
            ModelError: not enough memory.
        """
        where = []
        for cache in caches:
            if cache is not None:
                cache.reserve(cache.length + 1)
            where.append((0, 0, -1) if cache is None else (cache.address, cache.room, cache.length))
        where += [(0, 0, -1)] * (self.size - len(where))
        if where != self._placed:
            self._where.copy_(torch.tensor(where).T)
        self._placed = where

    def run(self, variant: Variant | None) -> None:
        """Run one decode step of the tokens in `sampling.token`, whose logits go to `logits`.

        With a variant the next token is drawn, and the positions are counted up.
        """
        longest = max(position for _, _, position in self._placed)
        reach = BLOCK * round_up(max(longest, 0) // BLOCK + 1)
        graph = self._graphs.get((reach, variant))
        if graph is None:
            graph = self._graphs[reach, variant] = self._capture(reach, variant)
        graph.replay()
        if variant is not None:
            self._placed = [(*at, position + (position >= 0)) for *at, position in self._placed]  # type: ignore[misc]

    def _step(self, reach: int, variant: Variant | None) -> None:
        tokens = self.sampling.token
        self.network.decode(tokens, self._texts, reach, self._scratches[reach], self.logits)
        if variant is not None:
            sample(self.logits, self.sampling, self.position, variant, advance=True)

    def _capture(self, reach: int, variant: Variant | None) -> torch.cuda.CUDAGraph:
        device = self.network.device
        if reach not in self._scratches:
            self._scratches[reach] = Scratch(self.network.config, self.size, reach, device)
        # Kernels are compiled by a first run, on a copy of what a step changes, with all rows empty.
        changed = [self._where, *(value for name, value in vars(self.sampling).items() if name != "drawn")]
        kept = [tensor.clone() for tensor in changed]
        self._where[2] = -1
        self._step(reach, variant)
        for tensor, value in zip(changed, kept, strict=True):
            tensor.copy_(value)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step(reach, variant)
        return graph
