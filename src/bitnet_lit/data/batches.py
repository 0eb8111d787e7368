"""Batches of token ids, and the DataLoader that reads them, in processes of its own if the user asks for some.

Such a process imports this module and what it imports. Nothing here imports Lightning, which takes seconds. It hands
its batches over as numpy arrays, through a pipe. Tensors would go through shared memory, of which a container has 64 MB
by default; where it is full, PyTorch's loader waits for the batch without end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from bitnet_lit.data.order import Order
from bitnet_lit.data.prefetch import prefetched
from bitnet_lit.data.processes import without_main_script
from bitnet_lit.data.token_split import TokenSplit
from bitnet_lit.errors import DataError, UserError
from bitnet_lit.runs.signals import blocked, leave_to_parent

ORDER_BLOCK = 8192  # samples whose order is computed at once


class TrainBatches(Dataset):
    """Training batches, by the global index of their first sample.

    Args:
        batch_size: B, sequences of this rank in a forward pass.
    """

    def __init__(self, split: TokenSplit, order: Order, batch_size: int) -> None:
        self.split, self.order, self.batch_size = split, order, batch_size
        self._block_start, self._block = 0, np.empty(0, dtype=np.int64)

    def __getitem__(self, start: int) -> NDArray[np.int64]:
        """Return the token ids of the global samples [start, start + B), int64 (B, T + 1)."""
        offset = start - self._block_start
        if offset < 0 or offset + self.batch_size > len(self._block):
            # The order of many samples costs little more than that of a batch.
            samples = np.arange(start, start + max(ORDER_BLOCK, self.batch_size), dtype=np.int64)
            self._block_start, self._block, offset = start, self.order(samples), 0
            self._expect(start, int(samples[-1]))
        return self.split.gather(self._block[offset : offset + self.batch_size])

    def _expect(self, first: int, last: int) -> None:
        """Let the shards of some samples, and of those after them, be read ahead."""
        ahead, pieces = self.order.shards_ahead(first, last), self.split.pieces
        shards = [piece.path for piece in (pieces if ahead is None else [pieces[shard] for shard in ahead])]
        self.split.files.expect(shards, as_stream=ahead is not None)


class ValidationBatches(Dataset):
    """The validation sequences of each corpus in order, dealt out to the ranks: each rank gets as many batches.

    Args:
        splits: of the corpora.
        is_padded: whether the last batch has as many rows as the others, so that a network is compiled for one shape.
    """

    def __init__(
        self, splits: Sequence[TokenSplit], batch_size: int, rank: int, world_size: int, is_padded: bool = False
    ) -> None:
        self.splits, self.batch_size, self.is_padded = splits, batch_size, is_padded
        self.rank, self.world_size = rank, world_size

    def num_batches(self) -> list[int]:
        """Return how many batches each corpus has."""
        return [-(-split.num_sequences // (self.batch_size * self.world_size)) for split in self.splits]

    def __getitem__(self, number: tuple[int, int, bool]) -> tuple[NDArray[np.int64], int, int, bool]:
        """Return a batch.

        Args:
            number: its corpus, its number there, and whether it is of the part that every validation takes.

        Returns:
            Token ids, int64 (B', T + 1), how many of the rows count, the corpus, and whether it is of that part.
            Batches have B rows, the last one fewer unless it is padded. A rank that has no sequence left gets rows
            that do not count.
        """
        corpus, batch, in_part = number
        split = self.splits[corpus]
        start = (batch * self.world_size + self.rank) * self.batch_size
        num_valid = max(0, min(start + self.batch_size, split.num_sequences) - start)
        indices = np.zeros(self.batch_size if self.is_padded else max(1, num_valid), dtype=np.int64)
        indices[:num_valid] = np.arange(start, start + num_valid)
        return split.gather(indices), num_valid, corpus, in_part


class ErrorsAsItems(Dataset):
    """Returns an error that is one line in place of the batch: raised in a loader's process, it is a traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except (DataError, UserError) as error:
            return error


class BatchLoader(DataLoader):
    """A DataLoader whose processes do not run the caller's script, and which raises a `DataError` as one line.

    Its processes leave signals that ask the run to stop to their parent.

    Args:
        dataset: its items are whole batches: arrays, or tuples with an array in front. They come out as tensors.
        device: the CUDA device to which a thread copies the batches ahead of time. None: they stay where they are.
        pinned: whether they come in pinned memory, from which a copy to a GPU is not waited for.
    """

    def __init__(
        self, dataset: Dataset, device: torch.device | None = None, pinned: bool = False, **options: Any
    ) -> None:
        super().__init__(dataset, batch_size=None, collate_fn=_as_it_is, worker_init_fn=leave_to_parent, **options)
        self.device, self.pinned = device, pinned

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator is all that the trainer needs
        items: Iterator[Any]
        try:
            with without_main_script(), blocked():
                items = super().__iter__()
        except OSError as error:
            # As an item, because Lightning covers what `iter` raises by an error of its own.
            line = (
                f"data.num_workers={self.num_workers}: the processes cannot be started ({error.strerror or error}): "
                "take data.num_workers=0, or give the container shared memory (docker run --shm-size)"
            )
            items = iter([UserError(line)])
        batches = _tensors(items, self.pinned)
        return batches if self.device is None else prefetched(batches, self.device)


def _as_it_is(batch: Any) -> Any:
    """Stand in for PyTorch's collate function, which would make tensors in the loader's process."""
    return batch


def _tensors(items: Iterator[Any], pinned: bool) -> Iterator[Any]:
    """Yield batches with tensors in place of arrays, and raise errors that come as items."""
    for item in items:
        if isinstance(item, DataError | UserError):
            raise item
        array, *others = item if isinstance(item, tuple) else (item,)
        ids = torch.from_numpy(array)
        ids = ids.pin_memory() if pinned else ids
        yield (ids, *others) if others else ids
