"""This module has the config of the data: llama2.c shards, or a data module of the user's own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from bitnet_lit.config.checks import LENGTH, POSITIVE, SIZE, Checked, Range, one_of
from bitnet_lit.config.slots import Custom
from bitnet_lit.errors import UserError


@dataclass
class CorpusConfig(Checked):
    """CorpusConfig names one of several corpora."""

    dir: str
    """A folder of llama2.c shards, or the URL of one."""
    weight: float = 1.0
    """Its share of the samples, against the weights of the others."""

    OWNER: ClassVar[str] = "data.mix.<name>."
    RANGES: ClassVar[dict[str, Range]] = {"weight": POSITIVE}


def _corpus(name: str, values: Any) -> CorpusConfig:
    """Return the corpus that the keys of `data.mix.<name>` describe.

    Raises:
        UserError: a key is missing or unknown, or a value cannot be used.
    """
    if isinstance(values, CorpusConfig):
        return values
    known = [each.name for each in fields(CorpusConfig)]
    given = values if isinstance(values, dict) else {}
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"data.mix.{name}: a name has letters, digits, _ and -: choose another")
    if unknown := next((key for key in given if key not in known), None):
        raise UserError(f"data.mix.{name}.{unknown}: there is no such key: a corpus has {', '.join(known)}")
    if not isinstance(given.get("dir"), str) or not given["dir"]:
        raise UserError(f"data.mix.{name}: has no folder: give data.mix.{name}.dir=<folder of shards>")
    corpus = CorpusConfig(**given)
    return replace(corpus, weight=float(corpus.weight))


@dataclass
class DataConfig(Checked):
    """DataConfig names llama2.c shards, and says how they are divided into batches."""

    dir: str | None = None
    """A folder of llama2.c shards, or the URL of one: s3://, gs://, hf://, https://. null: the demo corpus, which is
    written to data/demo if it is not there."""
    mix: dict[str, Any] = field(default_factory=dict)  # OmegaConf adds no key to a dict of dataclasses
    """Several corpora in place of `dir`, by names of your own: data.mix.web.dir=... data.mix.web.weight=0.7. Each is a
    `CorpusConfig`."""
    shuffle: str = "global"
    """global: any sequence of the corpus may come next. shards: the shards in random order, and the sequences of
    shards_per_block shards in random order, so that a disk or a network is read shard by shard."""
    shards_per_block: int = 16
    """Shards whose sequences are mixed with each other, with shuffle=shards."""
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
    """The folder of this machine that keeps shards of a URL. null: ~/.cache/bitnet_lit/shards."""
    cache_gib: float = 20.0
    """The most that the shards in cache_dir take, in GiB. Those used least recently go first."""
    max_train_sequences: int | None = None
    """Train only on the first n sequences of each corpus. null: on all. mode=overfit sets one batch."""
    max_val_sequences: int | None = None
    """Validate only on the first n validation sequences of each corpus. null: on all. The modes that end in seconds set
    it, because the last validation takes all sequences. `evaluate` measures the whole split."""

    OWNER: ClassVar[str] = "data."
    RANGES: ClassVar[dict[str, Range]] = {
        "sequence_length": SIZE,
        "batch_size": SIZE,
        "num_workers": Range(0, 1024),
        "max_train_sequences": LENGTH,
        "max_val_sequences": LENGTH,
        "cache_gib": POSITIVE,
        "shards_per_block": SIZE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("data.shuffle", self.shuffle, ("global", "shards"))
        self.mix = {str(name): _corpus(str(name), values) for name, values in self.mix.items() if values is not None}
        if self.mix and self.dir is not None:
            raise UserError(f"data.dir={self.dir} with data.mix: give one of them")

    @property
    def shares(self) -> dict[str, float]:
        """The share of each corpus of `mix` in the samples, by name; they add up to 1."""
        total = sum(corpus.weight for corpus in self.mix.values())
        return {name: corpus.weight / total for name, corpus in self.mix.items()}


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
