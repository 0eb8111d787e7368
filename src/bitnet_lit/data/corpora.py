"""The corpora of a run: one folder of shards (`data.dir`), or several with weights (`data.mix`).

All of them must have one tokenizer. Their training splits become one split, whose sequences are numbered one corpus
behind the other, and one order, which deals out the samples (`MixedOrder`). Each corpus has epochs of its own: when
its sequences have all come, they come again in another order, however far the others are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_lit.config import DataConfig
from bitnet_lit.data.order import MixedOrder, Order, SampleOrder, ShardOrder
from bitnet_lit.data.remote_folder import RemoteDirectory
from bitnet_lit.data.shard_cache import ShardCache
from bitnet_lit.data.shard_directory import ShardDirectory
from bitnet_lit.data.shard_files import ShardFiles
from bitnet_lit.data.shards import open_shards
from bitnet_lit.data.token_split import TokenSplit
from bitnet_lit.errors import UserError


@dataclass
class Corpora:
    """Holds the opened folders of a run.

    Attributes:
        folders: by name; the name of a single one is empty.
    """

    config: DataConfig
    folders: dict[str, ShardDirectory]

    @property
    def first(self) -> ShardDirectory:
        """The first folder. All of them have its tokenizer and vocabulary."""
        return next(iter(self.folders.values()))

    def num_sequences(self, sequence_length: int) -> dict[str, int]:
        """Return the number of training sequences of each corpus: at most `data.max_train_sequences`."""
        return {name: self._used(folder.train(sequence_length)) for name, folder in self.folders.items()}

    def train(self, sequence_length: int, seed: int) -> tuple[TokenSplit, Order]:
        """Return all training sequences, and the order in which they come."""
        splits = [folder.train(sequence_length) for folder in self.folders.values()]
        orders = [self._order(split, seed) for split in splits]
        if len(splits) == 1:
            return splits[0], orders[0]
        files = [split.files for split in splits]
        remote = {url: shard for each in files for url, shard in each.remote.items()}
        cache = next((each.cache for each in files if each.cache is not None), None)
        pieces = [piece for split in splits for piece in split.pieces]
        together = TokenSplit(pieces, sequence_length, splits[0].dtype, splits[0].vocab_size, ShardFiles(remote, cache))
        weights = list(self.config.shares.values())
        sizes, shards = [split.num_sequences for split in splits], [len(split.pieces) for split in splits]
        return together, MixedOrder(orders, sizes, shards, weights)

    def validation(self, sequence_length: int) -> list[TokenSplit]:
        """Return the validation split of each corpus: at most `data.max_val_sequences` of its sequences."""
        splits = [folder.validation(sequence_length) for folder in self.folders.values()]
        count = self.config.max_val_sequences
        return splits if count is None else [split.first(count) for split in splits]

    def digests(self) -> dict[str, str]:
        """Return what identifies each shard, by `<corpus>/<file name>`, or by its file name alone."""
        return {
            f"{name}/{file}" if name else file: digest
            for name, folder in self.folders.items()
            for file, digest in folder.digests().items()
        }

    def _used(self, split: TokenSplit) -> int:
        return min(split.num_sequences, self.config.max_train_sequences or split.num_sequences)

    def _order(self, split: TokenSplit, seed: int) -> Order:
        used = self._used(split)
        if self.config.shuffle == "global":
            return SampleOrder(used, seed)
        ends = np.minimum(np.cumsum([piece.num_sequences for piece in split.pieces]), used)
        sizes = np.diff(ends, prepend=0)
        return ShardOrder(sizes[sizes > 0].tolist(), seed, self.config.shards_per_block)

    def check_cache(self) -> None:
        """Refuse remote folders of which the cache cannot hold what is read at the same time.

        Raises:
            UserError: they would be fetched again and again; the line says what is needed.
        """
        config = self.config
        # Of two blocks, one is read while the next one comes; and the shard for validation is read in between.
        at_once = None if config.shuffle == "global" else 2 * config.shards_per_block + 1
        needed = 0
        for folder in self.folders.values():
            if isinstance(folder, RemoteDirectory):
                sizes = sorted((shard.size for shard in folder.shards.values()), reverse=True)
                needed += sum(sizes[:at_once])
        if needed <= config.cache_gib * 2**30:
            return
        gib = f"{needed / 2**30:.3g} GiB"
        if at_once is None:
            raise UserError(
                f"data.cache_gib={config.cache_gib:g}: data.shuffle=global reads all {gib} of the shards at any time: "
                f"take data.shuffle=shards, or raise data.cache_gib"
            )
        raise UserError(
            f"data.cache_gib={config.cache_gib:g}: two blocks of {config.shards_per_block} shards take {gib}: lower "
            "data.shards_per_block, or raise data.cache_gib"
        )


def open_corpora(config: DataConfig) -> Corpora:
    """Open the folder of `data.dir`, or those of `data.mix`.

    Raises:
        UserError: a folder cannot be opened, or the folders have several tokenizers; one line.
        DataError: a remote folder cannot be reached; one line.
    """
    cache = ShardCache.default(config.cache_dir, config.cache_gib)
    tokenizer = None if config.tokenizer is None else Path(config.tokenizer)
    if config.mix:
        named = {name: (corpus.dir, f"data.mix.{name}.dir") for name, corpus in config.mix.items()}
    else:
        assert config.dir is not None
        named = {"": (config.dir, "data.dir")}
    folders = {name: open_shards(place, tokenizer, key, cache) for name, (place, key) in named.items()}
    _check_one_tokenizer(folders)
    corpora = Corpora(config, folders)
    corpora.check_cache()
    return corpora


def _check_one_tokenizer(folders: Mapping[str, ShardDirectory]) -> None:
    """Refuse folders that were written with several tokenizers: their ids would mean different things."""
    (first, expected), *others = ((name, _vocabulary(folder)) for name, folder in folders.items())
    for name, vocabulary in others:
        if vocabulary != expected:
            raise UserError(
                f"data.mix.{name}.dir={folders[name].folder}: another tokenizer than that of {first} "
                f"({_described(vocabulary)}, not {_described(expected)}): prepare both with one tokenizer="
            )


def _vocabulary(folder: ShardDirectory) -> tuple[Any, ...]:
    """Return what decides what the ids mean: the tokenizer's sha256, how ids are stored, and how many there are."""
    sha256 = folder.tokenizer.sha256 if folder.tokenizer else folder.meta.get("tokenizer_sha256")
    return sha256, folder.dtype.name, folder.vocab_size


def _described(vocabulary: tuple[Any, ...]) -> str:
    sha256, dtype, size = vocabulary
    return f"{size} entries, {dtype}, sha256 {'unknown' if sha256 is None else sha256[:12]}"
