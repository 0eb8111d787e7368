"""A model folder is written here; `model_folder.py` explains what it holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet_lit.checkpoints.file_names import CONFIG_NAME, GENERATION_NAME, WEIGHTS_NAME
from bitnet_lit.checkpoints.formats.model_folder import describe, written_names
from bitnet_lit.checkpoints.safetensors_writer import LazyTensor, write_safetensors
from bitnet_lit.checkpoints.stored_model import STATISTICS
from bitnet_lit.config import QuantConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.files.atomic import atomic_folder
from bitnet_lit.model import CausalLM
from bitnet_lit.model.tensors import HEAD, quantized_names


def write_folder(
    folder: Path,
    described: dict[str, Any],
    tensors: Iterable[LazyTensor],
    tokenizer: Tokenizer | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the files of a model folder into an existing, empty folder.

    Args:
        described: the content of config.json.
        metadata: texts for the header of model.safetensors.
    """
    generation = {"bos_token_id": described["bos_token_id"], "eos_token_id": described["eos_token_id"]}
    if tokenizer is not None:
        generation["eos_token_id"] = tokenizer.end_ids
        tokenizer.copy_to(folder)
    write_safetensors(folder / WEIGHTS_NAME, tensors, metadata)
    (folder / CONFIG_NAME).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    (folder / GENERATION_NAME).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def write_export(
    folder: Path,
    described: dict[str, Any],
    tensors: Iterable[LazyTensor],
    tokenizer: Tokenizer | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the files of a model folder, and what `transformers` needs for the tokenizer."""
    write_folder(folder, described, tensors, tokenizer, metadata)
    for name, content in (tokenizer.transformers_files() if tokenizer else {}).items():
        (folder / name).write_text(content, encoding="utf-8")


def statistics_metadata(names: Iterable[str], read: Callable[[str], Tensor], quant: QuantConfig) -> dict[str, str]:
    """Return scale and center of latent weights as metadata of a safetensors file.

    The result is empty for a scheme that needs more than these two numbers to quantize a weight.

    Args:
        names: the quantized weights.
        read: returns a latent weight by its name.
    """
    noted, rule = {}, quant.scheme.weights
    for name in sorted(names):
        assert rule is not None, "a dense model has no quantized weights"
        if (statistics := rule.statistics(read(name).detach().float().cpu())) is not None:
            scale, center = map(float, statistics)
            noted[name] = (scale, center)  # JSON keeps every bit of a float32
    return {STATISTICS: json.dumps(noted, separators=(",", ":"))} if noted else {}


def save_model_folder(
    folder: Path,
    model: CausalLM,
    quant: QuantConfig,
    tokenizer: Tokenizer | None,
    info: dict[str, Any] | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a latent model folder, replacing an older one in one step; files that the user has put there stay.

    Args:
        folder: the target; its parent is created if it is missing.
        model: gives the sizes, and the weights if `state_dict` is None (a sharded run gathers them itself).
        info: plain data to keep in config.json.
    """
    state = model.state_dict() if state_dict is None else state_dict
    if model.config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != HEAD}
    tensors = [
        LazyTensor(name, tuple(tensor.shape), torch.float32, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in state.items()
    ]
    statistics = statistics_metadata(quantized_names(model.config, quant), state.__getitem__, quant)
    described = describe(model.config, quant, tokenizer, info or {})
    with atomic_folder(folder, written_names) as temporary:
        write_folder(temporary, described, tensors, tokenizer, statistics)
