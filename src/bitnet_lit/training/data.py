"""Training asks for its data here, and gets the same interface for our shards and for a data module of the user's own.

`open_data` returns a `RunData`: `ShardData` for a folder of shards, `OwnData` for a class named by `data._target_`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from bitnet_lit.config import CustomData, DataConfig, PrepareConfig, TrainConfig
from bitnet_lit.data.custom import NO_BATCH, CustomDataModule, checked, length_of, open_custom, own_tokenizer
from bitnet_lit.data.datamodule import BitNetDataModule
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.shard_cache import ShardCache
from bitnet_lit.data.shard_folder import is_complete
from bitnet_lit.data.shards import open_shards
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError

DEMO_DIR = Path("data/demo")


class RunData(Protocol):
    """Describes what training needs to know about opened data.

    Attributes:
        name: the name that the printed plan shows.
        vocab_size: number of token ids; every id is below it.
        tokenizer: the tokenizer of the data; None where the data has none.
    """

    name: str
    vocab_size: int
    tokenizer: Tokenizer | None

    def num_train_sequences(self, sequence_length: int) -> int | None:
        """Return the number of training sequences in an epoch, or None where it is not known.

        Args:
            sequence_length: tokens that a sequence predicts, T; the same in every method.
        """

    def rows(self, count: int, sequence_length: int) -> Tensor:
        """Return the first training sequences, int64 (at most `count`, T + 1)."""

    def identity(self) -> dict[str, Any]:
        """Return the facts about the data that must not change when the run is resumed (see `identity.py`)."""

    def datamodule(self, config: TrainConfig, sequence_length: int, samples_per_step: int) -> L.LightningDataModule:
        """Return the LightningDataModule for the Trainer.

        Args:
            samples_per_step: sequences of an optimizer step, over all devices and accumulated batches.
        """


class ShardData:
    """Reads the data from a folder of llama2.c shards."""

    def __init__(self, config: DataConfig) -> None:
        """Open the shards of `data.dir`. Without it, open those in data/demo, and write them first if they are missing.

        Raises:
            UserError: the folder holds no complete shards, or they cannot be read.
        """
        folder = config.dir
        if folder is None:
            folder = str(DEMO_DIR)
            if not is_complete(DEMO_DIR):  # several ranks may come here: `prepare` lets one write and the others wait
                prepare(PrepareConfig(source="demo", out=folder))
        self.config = config
        tokenizer = None if config.tokenizer is None else Path(config.tokenizer)
        cache = ShardCache.default(config.cache_dir, config.cache_gib)
        self.shards = open_shards(folder, tokenizer, cache=cache)
        self.name = str(self.shards.folder)
        self.vocab_size, self.tokenizer = self.shards.vocab_size, self.shards.tokenizer

    def num_train_sequences(self, sequence_length: int) -> int:
        """Return the number of training sequences in an epoch: at most `data.max_train_sequences`."""
        num_sequences = self.shards.train(sequence_length).num_sequences
        return min(num_sequences, self.config.max_train_sequences or num_sequences)

    def rows(self, count: int, sequence_length: int) -> Tensor:
        """See `RunData`."""
        split = self.shards.train(sequence_length)
        return torch.from_numpy(split.gather(np.arange(min(count, split.num_sequences))))

    def identity(self) -> dict[str, Any]:
        """See `RunData`."""
        hashes = {f"the shard {name}": digest for name, digest in self.shards.digests().items()}
        return {"data.max_train_sequences": self.config.max_train_sequences, **hashes}

    def datamodule(self, config: TrainConfig, sequence_length: int, samples_per_step: int) -> BitNetDataModule:
        """See `RunData`."""
        limit = config.trainer.limit_val_batches
        return BitNetDataModule(self.config, self.shards, sequence_length, samples_per_step, limit, config.seed)


class OwnData:
    """Reads the data from a data module of the user's own (data/custom.py says what it must have)."""

    def __init__(self, config: CustomData, sequence_length: int, seed: int) -> None:
        is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        self.config, self.sequence_length = config, sequence_length
        self.own = open_custom(config, sequence_length, seed, is_first)
        self.name, self.vocab_size = config._target_, self.own.vocab_size
        self.tokenizer = own_tokenizer(self.own)

    def _check_length(self, sequence_length: int) -> None:
        if sequence_length != self.sequence_length:
            raise UserError(
                f"data.sequence_length: {self.name} was opened for {self.sequence_length} tokens, and the model of "
                f"init_from takes {sequence_length}: give data.sequence_length={sequence_length}"
            )

    def num_train_sequences(self, sequence_length: int) -> int | None:
        """See `RunData`."""
        self._check_length(sequence_length)
        length = length_of(self.own.train_dataloader())
        if length == 0:
            raise UserError(NO_BATCH)
        return None if length is None else length * self.config.batch_size

    def rows(self, count: int, sequence_length: int) -> Tensor:
        """See `RunData`. The sequences are those of the first batch."""
        self._check_length(sequence_length)
        return checked(next(iter(self.own.train_dataloader())), sequence_length, self.vocab_size)[:count]

    def identity(self) -> dict[str, Any]:
        """See `RunData`. The facts are the class and its arguments."""
        free = ("num_workers",)  # changes only the speed
        call = {f"data.{key}": value for key, value in self.config.call.items() if key not in free}
        return {**call, "data.batch_size": self.config.batch_size, "vocab_size of data": self.vocab_size}

    def datamodule(self, config: TrainConfig, sequence_length: int, samples_per_step: int) -> CustomDataModule:
        """See `RunData`."""
        limit = config.trainer.limit_val_batches
        return CustomDataModule(self.config, self.own, sequence_length, samples_per_step, limit, config.seed)


def sequence_length(config: TrainConfig) -> int:
    """Return the number of tokens that a sequence predicts, T.

    Raises:
        UserError: `data.sequence_length` is longer than the model's context.
    """
    context = config.model.max_position_embeddings
    length = config.data.sequence_length or context
    if length > context:
        raise UserError(
            f"data.sequence_length={length} is longer than model.max_position_embeddings={context}: raise the latter"
        )
    return length


def open_data(config: TrainConfig) -> RunData:
    """Open the data of `config.data`.

    Raises:
        UserError: there is no data, or it cannot be read.
    """
    if isinstance(config.data, CustomData):
        return OwnData(config.data, sequence_length(config), config.seed)
    return ShardData(config.data)
