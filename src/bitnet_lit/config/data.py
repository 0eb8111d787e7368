"""This module has the config of the data: llama2.c shards, or a data module of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitnet_lit.config.checks import LENGTH, POSITIVE, SIZE, Checked, Range
from bitnet_lit.config.slots import Custom


@dataclass
class DataConfig(Checked):
    """DataConfig names llama2.c shards, and says how they are divided into batches."""

    dir: str | None = None
    """A folder of llama2.c shards, or the URL of one: s3://, gs://, hf://, https://. null: the demo corpus, which is
    written to data/demo if it is not there."""
    tokenizer: str | None = None
    """The tokenizer, for shards that come without one: its file, or its folder."""
    sequence_length: int | None = None
    """The number of tokens that a sequence predicts. null: the context of the model."""
    batch_size: int = 32
    """Sequences per device and forward pass. An optimizer step has batch_size * devices *
    trainer.accumulate_grad_batches sequences."""
    num_workers: int = 0
    """Processes that read batches. Reading takes microseconds per sequence; 0 is right unless the disk is slow."""
    cache_dir: str | None = None
    """Where shards of a URL are kept on this machine. null: ~/.cache/bitnet_lit/shards."""
    cache_gib: float = 20.0
    """The most that the shards in cache_dir take, in GiB. Those used least recently go first."""
    max_train_sequences: int | None = None
    """Train only on the first n sequences of the shuffled corpus. null: on all. mode=overfit sets one batch."""

    OWNER: ClassVar[str] = "data."
    RANGES: ClassVar[dict[str, Range]] = {
        "sequence_length": SIZE,
        "batch_size": SIZE,
        "num_workers": Range(0, 1024),
        "max_train_sequences": LENGTH,
        "cache_gib": POSITIVE,
    }


@dataclass
class CustomData(Custom):
    """CustomData configures a LightningDataModule of the user's own. data/custom.py says what it must have.

    The class gets every other key of the group, and `batch_size`, `sequence_length` and `seed` if its constructor has
    arguments with these names.
    """

    sequence_length: int | None = None
    """The number of tokens that a sequence predicts. null: the context of the model."""
    batch_size: int = 32
    """Sequences in a batch of its data loaders."""

    OWNER: ClassVar[str] = "data."
    RANGES: ClassVar[dict[str, Range]] = {"sequence_length": SIZE, "batch_size": SIZE}
