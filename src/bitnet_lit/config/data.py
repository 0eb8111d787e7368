"""The data of a run: llama2.c shards, or a data module of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitnet_lit.config.checks import LENGTH, SIZE, Checked, Range
from bitnet_lit.config.slots import Custom


@dataclass
class DataConfig(Checked):
    """llama2.c shards and how batches are cut from them."""

    dir: str | None = None
    """A folder of llama2.c shards. null: the demo corpus, written to data/demo when it is not there yet."""
    tokenizer: str | None = None
    """The tokenizer of shards that come without one: its file, or a folder that holds it."""
    sequence_length: int | None = None
    """Tokens a sequence predicts. null: the model's context."""
    batch_size: int = 32
    """Sequences per device and forward pass; times devices times trainer.accumulate_grad_batches is one step."""
    num_workers: int = 0
    """Processes that read batches. Reading takes microseconds a sequence; 0 is right unless the disk is slow."""
    max_train_sequences: int | None = None
    """Train on the first n sequences of the shuffled corpus only. null: all. mode=overfit sets one batch."""

    OWNER: ClassVar[str] = "data."
    RANGES: ClassVar[dict[str, Range]] = {
        "sequence_length": SIZE,
        "batch_size": SIZE,
        "num_workers": Range(0, 1024),
        "max_train_sequences": LENGTH,
    }


@dataclass
class CustomData(Custom):
    """A LightningDataModule of the user's own (data/custom.py says what it must have).

    It gets the other keys, and `batch_size`, `sequence_length` and `seed` if it has arguments of these names.
    """

    sequence_length: int | None = None
    """Tokens a sequence predicts. null: the model's context."""
    batch_size: int = 32
    """Sequences in a batch of its loaders."""

    OWNER: ClassVar[str] = "data."
    RANGES: ClassVar[dict[str, Range]] = {"sequence_length": SIZE, "batch_size": SIZE}
