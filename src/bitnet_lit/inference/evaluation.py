"""Evaluation of a trained model: one deterministic pass over a whole validation split.

It gives the figures that training logs as `val/...` (loss_sums.py), for any model that can be opened and any folder of
shards with the model's tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet_lit.checkpoints.pretrained import PretrainedModel, from_pretrained
from bitnet_lit.config import CustomData, EvaluateConfig
from bitnet_lit.config.slots import TARGET, custom
from bitnet_lit.data.custom import checked, open_custom
from bitnet_lit.data.shards import ShardDirectory, open_shards
from bitnet_lit.data.token_split import TokenSplit
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import ModelError, UserError
from bitnet_lit.inference.loss_sums import LossSums
from bitnet_lit.instantiate import check_allowed
from bitnet_lit.model import CausalLM
from bitnet_lit.plain_yaml import read_yaml


@torch.inference_mode()
def evaluate_batches(
    model: CausalLM, batches: Iterable[Tensor], tokenizer: Tokenizer | None, device: torch.device
) -> LossSums:
    """Run the model on every batch once; batches are int64 (B, T + 1)."""
    sums = LossSums()
    for ids in batches:
        ids = ids.to(device)
        sums.add(model(ids[:, :-1]), ids, tokenizer)
    return sums


def split_batches(split: TokenSplit, batch_size: int) -> Iterator[Tensor]:
    """Every sequence of `split` once, in order."""
    for start in range(0, split.num_sequences, batch_size):
        indices = np.arange(start, min(start + batch_size, split.num_sequences))
        yield torch.from_numpy(split.gather(indices))


def _data_of_run(model: Path) -> dict[str, Any]:
    """The keys of `data` in the config of the run that a model folder lies in; none where it lies in no run.

    The model folder itself says nothing about folders of this machine.
    """
    config = model.parent / "config.yaml"
    if not config.is_file():
        return {}
    data = read_yaml(config, "give data_dir=<folder of shards>").get("data")
    return data if isinstance(data, dict) else {}


def _own_batches(
    pretrained: PretrainedModel, data: dict[str, Any], length: int, config: EvaluateConfig
) -> Iterator[Tensor]:
    """The validation batches of the user's own data module that a run was trained with.

    Raises:
        UserError: the user has not named its class, or its ids are not the model's.
    """
    where = str(pretrained.path.parent / "config.yaml")
    check_allowed({"data": data}, config.allow, where, f"checkpoint={config.checkpoint or pretrained.path}")
    opened = custom(CustomData, data)
    own = open_custom(replace(opened, sequence_length=length), length, seed=0)
    vocabulary = pretrained.config.vocab_size or 0
    if own.vocab_size > vocabulary:
        raise UserError(
            f"{opened.name}: has a vocabulary of {own.vocab_size} tokens, and the model one of {vocabulary}"
        )
    for ids in own.val_dataloader():
        yield checked(ids, length, own.vocab_size)


def _open_data(pretrained: PretrainedModel, data_dir: str | None) -> tuple[str, ShardDirectory]:
    """The shards to evaluate on, and their folder: the one that is given, or the one of the training.

    Raises:
        UserError: no data, or data of another tokenizer.
    """
    path = pretrained.path
    data_dir = data_dir or pretrained.info.get("data_dir") or _data_of_run(path).get("dir")
    if not isinstance(data_dir, str):
        data_dir = None
    if data_dir is None:
        raise UserError(f"{path}: does not say what it was trained on: give data_dir=<folder of shards>")
    own = pretrained.tokenizer.path if pretrained.tokenizer else None
    shards = open_shards(Path(data_dir), own)
    if shards.vocab_size > (pretrained.config.vocab_size or 0):  # some embeddings have rows to spare
        raise UserError(
            f"data_dir={data_dir}: has a vocabulary of {shards.vocab_size} tokens, and the model one of "
            f"{pretrained.config.vocab_size}: prepare the text with tokenizer={own or '<the tokenizer of the model>'}"
        )
    wrote = shards.meta.get("tokenizer_sha256")
    if None not in (wrote, pretrained.tokenizer_sha256) and wrote != pretrained.tokenizer_sha256:
        raise UserError(
            f"data_dir={data_dir}: was written with another tokenizer than the one that {path} was trained with: "
            "prepare the text with that one"
        )
    return data_dir, shards


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """What `python -m bitnet_lit.evaluate` does.

    Returns:
        The figures of `LossSums.metrics`, and what they were measured on: `tokens`, `sequence_length`, `data_dir` and
        `checkpoint`.

    Raises:
        UserError: no model, no data, or data of another tokenizer.
        ModelError: the loss is NaN or infinite.
    """
    pretrained = from_pretrained(config.checkpoint)
    data = {} if config.data_dir else _data_of_run(pretrained.path)
    context = pretrained.config.max_position_embeddings
    length = config.sequence_length or pretrained.info.get("sequence_length") or context
    if length > context:
        raise UserError(
            f"sequence_length={length}: is beyond the model's context of {context} tokens: give {context} or less"
        )
    device = torch.device(_device(config.accelerator))
    model = pretrained.model.to(device)
    if TARGET in data:
        data_dir, batches = str(data[TARGET]), _own_batches(pretrained, data, length, config)
    else:
        data_dir, shards = _open_data(pretrained, config.data_dir)
        batches = split_batches(shards.validation(length), config.batch_size)
    sums = evaluate_batches(model, batches, pretrained.tokenizer, device)
    if not math.isfinite(sums.nats):
        raise ModelError(
            f"{pretrained.path}: its loss is {sums.nats}: the weights are finite, but what they compute overflows: "
            "train it again"
        )
    return {
        **sums.metrics(),
        "tokens": sums.tokens,
        "sequence_length": length,
        "data_dir": str(data_dir),
        "checkpoint": str(pretrained.path),
    }


def _device(accelerator: str) -> str:
    """PyTorch's name of the device that `accelerator`, Lightning's name, means.

    Raises:
        UserError: this machine does not have it.
    """
    cuda = torch.cuda.is_available()
    if accelerator == "auto":
        accelerator = "gpu" if cuda else "cpu"
    available = {"cpu": True, "gpu": cuda, "cuda": cuda, "mps": torch.backends.mps.is_available()}
    if not available[accelerator]:
        raise UserError(f"accelerator={accelerator}: not available on this machine: take accelerator=cpu")
    return {"gpu": "cuda"}.get(accelerator, accelerator)
