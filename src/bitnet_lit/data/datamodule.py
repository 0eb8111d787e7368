"""The LightningDataModule: wires shards, order and loaders, and keeps the one number that is state.

Training batch m of a run that starts at sample s: rank r of W takes the global samples
[s + (m * W + r) * B, ... + B). Which tokens a sample holds is a pure function of (seed, sample), so the order does
not depend on ranks, on workers, or on where the run was resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset, Sampler

from bitnet_lit.config import DataConfig
from bitnet_lit.data.batches import BatchLoader, ErrorsAsItems, TrainBatches, ValidationBatches
from bitnet_lit.data.order import SampleOrder
from bitnet_lit.data.shards import ShardDirectory


class Starts(Sampler[int]):
    """First samples of this rank's batches, without end: the trainer knows when to stop."""

    def __init__(self, first: int, rank: int, world_size: int, batch_size: int) -> None:
        self.first = first + rank * batch_size
        self.stride = world_size * batch_size

    def __iter__(self) -> Iterator[int]:
        start = self.first
        while True:
            yield start
            start += self.stride


class ValidationOrder(Sampler[int]):
    """Batches of a validation: the first `limit` (a float: a share of them), or all when the run is at its end.

    It has no length, so that the trainer asks it anew each time instead of counting once.
    """

    def __init__(self, num_batches: int, limit: int | float | None, trainer: L.Trainer) -> None:
        self.num_batches, self.trainer = num_batches, trainer
        self.limit = max(1, int(limit * num_batches)) if isinstance(limit, float) else limit

    def __iter__(self) -> Iterator[int]:
        at_end = self.trainer.should_stop
        return iter(range(self.num_batches if at_end else min(self.num_batches, self.limit or self.num_batches)))


class BitNetDataModule(L.LightningDataModule):
    """Loaders over a folder of shards.

    Args:
        shards: the opened folder.
        sequence_length: tokens a sequence predicts (T).
        samples_per_step: sequences that all ranks consume in an optimizer step.
        limit_val_batches: batches of a validation inside the run, or a share of them; None: all.
        seed: of the order.
    """

    def __init__(
        self,
        config: DataConfig,
        shards: ShardDirectory,
        sequence_length: int,
        samples_per_step: int,
        limit_val_batches: int | float | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.limit_val_batches = limit_val_batches
        self.samples_per_step = samples_per_step
        self.train_split = shards.train(sequence_length)
        self.validation_split = shards.validation(sequence_length)
        num_sequences = min(self.train_split.num_sequences, config.max_train_sequences or 2**62)
        self.order = SampleOrder(num_sequences, seed)
        self.resumed = {"consumed_samples": 0, "step": 0}

    def _loader(self, dataset: Dataset, sampler: Sampler[int], num_workers: int) -> DataLoader:
        assert self.trainer is not None
        return BatchLoader(
            ErrorsAsItems(dataset),
            batch_size=None,  # a batch is gathered at once
            sampler=sampler,
            num_workers=num_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            # A forked copy of a process that has run OpenMP loops can hang in its first one.
            multiprocessing_context="spawn" if num_workers else None,
            persistent_workers=num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader:
        """Batches from the first sample that has not been consumed yet."""
        assert self.trainer is not None
        starts = Starts(
            self.resumed["consumed_samples"],
            self.trainer.global_rank,
            self.trainer.world_size,
            self.config.batch_size,
        )
        return self._loader(
            TrainBatches(self.train_split, self.order, self.config.batch_size), starts, self.config.num_workers
        )

    def val_dataloader(self) -> DataLoader:
        """The validation split in order; see `ValidationOrder` for how much of it."""
        assert self.trainer is not None
        batches = ValidationBatches(
            self.validation_split, self.config.batch_size, self.trainer.global_rank, self.trainer.world_size
        )
        return self._loader(batches, ValidationOrder(len(batches), self.limit_val_batches, self.trainer), 0)

    def state_dict(self) -> dict[str, Any]:
        """How many samples the run has consumed, and the optimizer step that it counts from."""
        assert self.trainer is not None
        steps = self.trainer.global_step - self.resumed["step"]
        return {
            "consumed_samples": self.resumed["consumed_samples"] + steps * self.samples_per_step,
            "step": self.trainer.global_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the last consumed sample."""
        self.resumed = dict(state_dict)
