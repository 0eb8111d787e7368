"""A model is evaluated on the shards that the user names, or on what it was trained on; batches are made here.

A model folder says nothing about folders of the machine it was trained on. The run that it lies in does, in its
config.yaml: a folder of shards, or a data module of the user's own, which is imported only if the user names it again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet_lit.checkpoints.custom_folder import CustomPretrained
from bitnet_lit.checkpoints.pretrained import PretrainedModel
from bitnet_lit.config import CustomData, EvaluateConfig
from bitnet_lit.config.slots import TARGET, custom
from bitnet_lit.data.shard_cache import DEFAULT_GIB, ShardCache
from bitnet_lit.data.shards import ShardDirectory, open_shards
from bitnet_lit.data.token_split import TokenSplit
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.files.plain_yaml import read_yaml
from bitnet_lit.instantiate import check_allowed
from bitnet_lit.runs.folder import CONFIG_NAME


def validation_batches(
    pretrained: PretrainedModel | CustomPretrained, config: EvaluateConfig, length: int
) -> tuple[str, Iterator[Tensor], Tokenizer | None]:
    """Return the validation split to evaluate on.

    Args:
        length: tokens that a sequence predicts.

    Returns:
        The folder of the shards, or the class of the data module; batches, int64 (B, length + 1); and the tokenizer
        of the text, the model's or else the data's.

    Raises:
        UserError: no data, data of another tokenizer, or a data module that the user has not named.
    """
    run = _data_of_run(pretrained.path)
    data = {} if config.data_dir else run
    if TARGET in data:
        batches, tokenizer = _own_batches(pretrained, data, length, config)
        return str(data[TARGET]), batches, pretrained.tokenizer or tokenizer
    data_dir = config.data_dir or pretrained.info.get("data_dir") or data.get("dir")
    if isinstance(mix := data.get("mix"), dict) and mix and not isinstance(data_dir, str):
        folders = [str(corpus["dir"]) for corpus in mix.values() if isinstance(corpus, dict) and "dir" in corpus]
        raise UserError(
            f"{pretrained.path}: was trained on several corpora ({', '.join(mix)}): give the one to evaluate on: "
            f"data_dir={', '.join(folders)}"
        )
    if not isinstance(data_dir, str):
        raise UserError(f"{pretrained.path}: does not say what it was trained on: give data_dir=<folder of shards>")
    shards = _open_shards(pretrained, data_dir, _cache_of_run(run))
    batches = _split_batches(shards.validation(length), config.batch_size)
    return data_dir, batches, pretrained.tokenizer or shards.tokenizer


def _data_of_run(model: Path) -> dict[str, Any]:
    """Return the keys of `data` in the config of the run that a model folder lies in; none where it lies in no run."""
    config = model.parent / CONFIG_NAME
    if not config.is_file():
        return {}
    data = read_yaml(config, "give data_dir=<folder of shards>").get("data")
    return data if isinstance(data, dict) else {}


def _cache_of_run(data: dict[str, Any]) -> ShardCache:
    """Return the cache of remote shards that a run used; the user's own where that one is not on this machine."""
    folder, gib = data.get("cache_dir"), data.get("cache_gib")
    is_here = isinstance(folder, str) and os.path.isdir(folder)
    if isinstance(gib, bool) or not isinstance(gib, int | float) or not 0 < gib < float("inf"):
        gib = DEFAULT_GIB
    return ShardCache.default(folder if is_here else None, gib)


def _digests_of_run(model: Path) -> list[dict[str, str]]:
    """Return the digests of the shards that a run was trained on, for each corpus; its last.ckpt has them."""
    from bitnet_lit.training.identity import shard_digests
    from bitnet_lit.training.start import read_start  # imports Lightning, which takes seconds

    return shard_digests(read_start(str(model.parent)).state.get("identity") or {})


def _open_shards(pretrained: PretrainedModel | CustomPretrained, data_dir: str, cache: ShardCache) -> ShardDirectory:
    """Open a folder of shards, which must be of the model's tokenizer."""
    path, vocabulary = pretrained.path, pretrained.config.vocab_size or 0
    tokenizer = pretrained.tokenizer.path if pretrained.tokenizer else None
    shards = open_shards(data_dir, tokenizer, "data_dir", cache, known=lambda: _digests_of_run(path))
    if shards.vocab_size > vocabulary:  # some embeddings have rows to spare
        raise UserError(
            f"data_dir={data_dir}: has a vocabulary of {shards.vocab_size} tokens, and the model one of {vocabulary}: "
            f"prepare the text with tokenizer={tokenizer or '<the tokenizer of the model>'}"
        )
    wrote = shards.meta.get("tokenizer_sha256")
    if None not in (wrote, pretrained.tokenizer_sha256) and wrote != pretrained.tokenizer_sha256:
        raise UserError(
            f"data_dir={data_dir}: was written with another tokenizer than the one that {path} was trained with: "
            "prepare the text with that one"
        )
    return shards


def _split_batches(split: TokenSplit, batch_size: int) -> Iterator[Tensor]:
    """Yield every sequence of a split once, in order."""
    for start in range(0, split.num_sequences, batch_size):
        indices = np.arange(start, min(start + batch_size, split.num_sequences))
        yield torch.from_numpy(split.gather(indices))


def _own_batches(
    pretrained: PretrainedModel | CustomPretrained, data: dict[str, Any], length: int, config: EvaluateConfig
) -> tuple[Iterator[Tensor], Tokenizer | None]:
    """Return the validation batches of the user's own data module that a run was trained with, and its tokenizer."""
    from bitnet_lit.data.custom import checked, open_custom, own_tokenizer  # imports Lightning, which takes seconds

    where = str(pretrained.path.parent / CONFIG_NAME)
    check_allowed({"data": data}, config.allow, where, f"checkpoint={config.checkpoint or pretrained.path}")
    opened = custom(CustomData, data)
    own = open_custom(replace(opened, sequence_length=length), length, seed=0)
    vocabulary = pretrained.config.vocab_size or 0
    if own.vocab_size > vocabulary:
        raise UserError(
            f"{opened.name}: has a vocabulary of {own.vocab_size} tokens, and the model one of {vocabulary}: give "
            "data_dir=<folder of shards>"
        )
    return (checked(ids, length, own.vocab_size) for ids in own.val_dataloader()), own_tokenizer(own)
