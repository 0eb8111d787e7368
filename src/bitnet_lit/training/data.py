"""Training asks for its data here, and gets the same interface for our shards and for a data module of the user's own.

`open_data` returns a `RunData`: `ShardData` for a folder of shards, `OwnData` for a class named by `data._target_`.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from bitnet_lit.config import CustomData, DataConfig, PrepareConfig, TrainConfig
from bitnet_lit.data.corpora import open_corpora
from bitnet_lit.data.custom import NO_BATCH, CustomDataModule, checked, length_of, open_custom, own_tokenizer
from bitnet_lit.data.datamodule import BitNetDataModule, limited
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.shard_folder import is_complete
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.training.identity import SHARD
from bitnet_lit.training.plan import world_size

DEMO_DIR = Path("data/demo")


class RunData(Protocol):
    """Describes what training needs to know about opened data.

    Attributes:
        name: where it comes from, for messages.
        vocab_size: number of token ids; every id is below it.
        tokenizer: the tokenizer of the data; None where the data has none.
    """

    name: str
    vocab_size: int
    tokenizer: Tokenizer | None

    def described(self, tokens: int, sequence_length: int) -> str:
        """Return what the printed plan says about the data.

        Args:
            tokens: that the run trains on.
        """

    def num_train_sequences(self, sequence_length: int) -> int | None:
        """Return the number of training sequences in an epoch, or None where it is not known.

        Args:
            sequence_length: tokens that a sequence predicts, T; the same in every method.
        """

    def num_validation_sequences(self, config: TrainConfig, sequence_length: int) -> tuple[int, int] | None:
        """Return how many sequences a validation takes on all devices together, and how many the last one takes.

        Returns:
            None where the data does not say.
        """

    def rows(self, count: int, sequence_length: int) -> Tensor:
        """Return the first training sequences, int64 (at most `count`, T + 1)."""

    def identity(self) -> dict[str, Any]:
        """Return the facts about the data that must not change when the run is resumed (see `identity.py`)."""

    def datamodule(
        self, config: TrainConfig, sequence_length: int, samples_per_step: int
    ) -> BitNetDataModule | CustomDataModule:
        """Return the LightningDataModule for the Trainer.

        Args:
            samples_per_step: sequences of an optimizer step, over all devices and accumulated batches.
        """


class ShardData:
    """Reads the data from folders of llama2.c shards."""

    def __init__(self, config: DataConfig) -> None:
        """Open the shards of `data.dir` or `data.mix`; data/demo is written if it is missing.

        Raises:
            UserError: the folder holds no complete shards, or they cannot be read.
        """
        if config.dir == str(DEMO_DIR) and not is_complete(DEMO_DIR):
            # Several ranks may come here: `prepare` lets one write and the others wait.
            prepare(PrepareConfig(source=["demo"], out=config.dir))
        self.config = config
        self.corpora = open_corpora(config)
        self.name = ", ".join(str(folder.folder) for folder in self.corpora.folders.values())
        self.vocab_size, self.tokenizer = self.corpora.first.vocab_size, self.corpora.first.tokenizer

    def described(self, tokens: int, sequence_length: int) -> str:
        """See `RunData`. Of several corpora: the share, tokens and epochs of each."""
        shares = self.config.shares
        if not shares:
            return self.name
        sizes = self.corpora.num_sequences(sequence_length)
        lines = []
        for name, share in shares.items():
            epochs = share * tokens / (sizes[name] * sequence_length)
            place = self.corpora.folders[name].folder
            lines.append(f"{name}: {100 * share:.3g} %, {share * tokens:,.0f} tokens, {epochs:.2f} epochs of {place}")
        return "\n".join(lines)

    def num_train_sequences(self, sequence_length: int) -> int:
        """Return the number of training sequences in an epoch: those of all corpora."""
        return sum(self.corpora.num_sequences(sequence_length).values())

    def num_validation_sequences(self, config: TrainConfig, sequence_length: int) -> tuple[int, int]:
        """See `RunData`. Each corpus is limited by itself."""
        size, limit = self.config.batch_size * world_size(config.trainer), config.trainer.limit_val_batches
        counts = [split.num_sequences for split in self.corpora.validation(sequence_length)]
        part = sum(min(count, size * limited(-(-count // size), limit)) for count in counts)
        return part, sum(counts)

    def rows(self, count: int, sequence_length: int) -> Tensor:
        """See `RunData`."""
        split = self.corpora.first.train(sequence_length)
        return torch.from_numpy(split.gather(np.arange(min(count, split.num_sequences))))

    def identity(self) -> dict[str, Any]:
        """See `RunData`."""
        hashes = {f"{SHARD}{name}": digest for name, digest in self.corpora.digests().items()}
        # With other validation sequences the losses before and after a resume could not be compared.
        facts: dict[str, Any] = {
            f"data.{key}": getattr(self.config, key) for key in ("max_train_sequences", "max_val_sequences")
        }
        if self.config.mix:
            facts["data.mix"] = ", ".join(self.config.mix)  # where two are due, the first one comes
        facts |= {f"data.mix.{name}.weight": corpus.weight for name, corpus in self.config.mix.items()}
        facts["data.shuffle"] = self.config.shuffle
        if self.config.shuffle == "shards":
            facts["data.shards_per_block"] = self.config.shards_per_block
        return {**facts, **hashes}

    def datamodule(self, config: TrainConfig, sequence_length: int, samples_per_step: int) -> BitNetDataModule:
        """See `RunData`."""
        limit = config.trainer.limit_val_batches
        return BitNetDataModule(self.config, self.corpora, sequence_length, samples_per_step, limit, config.seed)


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

    def described(self, tokens: int, sequence_length: int) -> str:
        """See `RunData`. It is the name of the class."""
        return self.name

    def num_train_sequences(self, sequence_length: int) -> int | None:
        """See `RunData`."""
        self._check_length(sequence_length)
        length = length_of(self.own.train_dataloader())
        if length == 0:
            raise UserError(NO_BATCH)
        return None if length is None else length * self.config.batch_size

    def num_validation_sequences(self, config: TrainConfig, sequence_length: int) -> None:
        """See `RunData`. The number is known once the user's loader has given them."""

    def rows(self, count: int, sequence_length: int) -> Tensor:
        """See `RunData`. The sequences are those of the first batch."""
        self._check_length(sequence_length)
        for ids in self.own.train_dataloader():
            return checked(ids, sequence_length, self.vocab_size)[:count]
        raise UserError(NO_BATCH)

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


def filled_in(config: TrainConfig) -> TrainConfig:
    """Return the config with two defaults filled in, so that config.yaml names them.

    They are the folder of the demo corpus, where it names no data, and the bits of the scheme's activations.
    """
    config, quant = copy(config), copy(config.quant)  # not `replace`, which would import the class of the scheme
    quant.activation_bits, config.quant = quant.bits, quant
    if isinstance(config.data, DataConfig) and config.data.dir is None and not config.data.mix:
        return replace(config, data=replace(config.data, dir=str(DEMO_DIR)))
    return config


def open_data(config: TrainConfig) -> RunData:
    """Open the data of `config.data`.

    Raises:
        UserError: there is no data, or it cannot be read.
    """
    if isinstance(config.data, CustomData):
        return OwnData(config.data, sequence_length(config), config.seed)
    return ShardData(config.data)
