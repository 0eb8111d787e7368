"""The LightningDataModule of shard folders. Its only state is the number of samples that were consumed.

In batch m of a run that starts at global sample s, rank r of W takes the B samples from s + (m * W + r) * B on. Which
tokens a sample holds is a pure function of the seed and the sample's index, so the order does not depend on the number
of ranks or workers, or on where the run was resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset, Sampler

from bitnet_lit.config import DataConfig
from bitnet_lit.data.batches import BatchLoader, ErrorsAsItems, TrainBatches, ValidationBatches
from bitnet_lit.data.corpora import Corpora


class Starts(Sampler[int]):
    """Yields the first sample of each batch of this rank, without end: the trainer knows when to stop."""

    def __init__(self, first: int, rank: int, world_size: int, batch_size: int) -> None:
        self.first = first + rank * batch_size
        self.stride = world_size * batch_size

    def __iter__(self) -> Iterator[int]:
        start = self.first
        while True:
            yield start
            start += self.stride


class ValidationOrder(Sampler[tuple[int, int, bool]]):
    """Yields the batches of a validation: corpus, number, and whether it is of the part that every validation takes.

    The part of each corpus is spread evenly over it, because its first batches may be of one document. The validation
    at the end of the run takes all batches. There is no length, so that the trainer iterates each time instead of
    counting once.

    Args:
        num_batches: of each corpus.
        limit: how many batches of a corpus, or, as a float, which share of them. None: all.
    """

    def __init__(self, num_batches: list[int], limit: int | float | None, trainer: L.Trainer) -> None:
        self.num_batches, self.limit, self.trainer = num_batches, limit, trainer

    def __iter__(self) -> Iterator[tuple[int, int, bool]]:
        for corpus, total in enumerate(self.num_batches):
            count = limited(total, self.limit)
            part = {number * total // count for number in range(count)}
            batches = range(total) if self.trainer.should_stop else sorted(part)
            yield from ((corpus, batch, batch in part) for batch in batches)


def limited(num_batches: int, limit: int | float | None) -> int:
    """Return how many of a corpus's batches every validation takes (see `ValidationOrder`)."""
    wanted = max(1, int(limit * num_batches)) if isinstance(limit, float) else limit
    return min(num_batches, wanted or num_batches)


class BitNetDataModule(L.LightningDataModule):
    """Batches of a folder of shards, or of several.

    Args:
        corpora: the opened folders.
        sequence_length: T, the tokens that a sequence predicts.
        samples_per_step: sequences that all ranks together consume in an optimizer step.
        limit_val_batches: batches that every validation takes, or, as a float, a share of them. None: all.
        seed: decides the order of the samples.

    Attributes:
        vocab_size: all token ids are below this number.
        tokenizer: the tokenizer that wrote the shards; None where it is not known.
    """

    def __init__(
        self,
        config: DataConfig,
        corpora: Corpora,
        sequence_length: int,
        samples_per_step: int,
        limit_val_batches: int | float | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.vocab_size, self.tokenizer = corpora.first.vocab_size, corpora.first.tokenizer
        self.config = config
        self.limit_val_batches = limit_val_batches
        self.samples_per_step = samples_per_step
        self.train_split, self.order = corpora.train(sequence_length, seed)
        self.validation_splits = corpora.validation(sequence_length)
        self.resumed = {"consumed_samples": 0, "step": 0}

    def _loader(self, dataset: Dataset, sampler: Sampler[Any], num_workers: int, **options: Any) -> DataLoader:
        return BatchLoader(
            ErrorsAsItems(dataset),
            sampler=sampler,
            num_workers=num_workers,
            # A process forked from one that has run OpenMP loops can hang in its own first loop.
            multiprocessing_context="spawn" if num_workers else None,
            persistent_workers=num_workers > 0,
            **options,
        )

    def train_dataloader(self) -> DataLoader:
        """Return batches from the first sample on that the run has not consumed: int64 (B, T + 1)."""
        assert self.trainer is not None
        starts = Starts(
            self.resumed["consumed_samples"],
            self.trainer.global_rank,
            self.trainer.world_size,
            self.config.batch_size,
        )
        batches = TrainBatches(self.train_split, self.order, self.config.batch_size)
        device = self.trainer.strategy.root_device
        return self._loader(batches, starts, self.config.num_workers, device=device if device.type == "cuda" else None)

    def val_dataloader(self) -> DataLoader:
        """Return batches of the validation splits, in order (see `ValidationBatches`)."""
        assert self.trainer is not None
        trainer, on_gpu = self.trainer, self.trainer.strategy.root_device.type == "cuda"
        batches = ValidationBatches(
            self.validation_splits, self.config.batch_size, trainer.global_rank, trainer.world_size, is_padded=on_gpu
        )
        for split in self.validation_splits:
            split.files.expect([piece.path for piece in split.pieces])
        order = ValidationOrder(batches.num_batches(), self.limit_val_batches, trainer)
        return self._loader(batches, order, 0, pinned=on_gpu)

    def state_dict(self) -> dict[str, Any]:
        """Return how many samples the run has consumed, and at which optimizer step."""
        assert self.trainer is not None
        steps = self.trainer.global_step - self.resumed["step"]
        return {
            "consumed_samples": self.resumed["consumed_samples"] + steps * self.samples_per_step,
            "step": self.trainer.global_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue behind the last consumed sample."""
        self.resumed = dict(state_dict)
