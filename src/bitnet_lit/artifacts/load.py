"""A model on disk as a network in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bitnet_lit.artifacts.locate import find_model, open_source
from bitnet_lit.artifacts.source import Source
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.data.tokenizer import Tokenizer
from bitnet_lit.model import CausalLM, build_model
from bitnet_lit.quant import BitLinear, PackedBitLinear


def fill(module: nn.Module, source: Source, prefix: str = "") -> nn.Module:
    """Give a module made on the meta device its weights.

    Args:
        module: part of the network of `source`, or the whole; latent projections stay trainable, packed ones become
            `PackedBitLinear`.
        prefix: of the module's names in the network ("model.layers.3.").
    """
    for name, layer in list(module.named_modules()):
        weight = f"{prefix}{name}.weight"
        if source.packed and isinstance(layer, BitLinear) and weight in source.quantized:
            bias = None if layer.bias is None else source.tensor(f"{prefix}{name}.bias")
            module.set_submodule(name, PackedBitLinear.from_codes(*source.codes(weight), bias, layer.scheme))
    for name in _parameter_names(module):
        if prefix + name in source.tensors:
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(source.tensor(prefix + name))
            setattr(module.get_submodule(owner), leaf, parameter)
    return module


def _parameter_names(module: nn.Module) -> Iterator[str]:
    for name, _ in list(module.named_parameters()):
        yield name


@dataclass
class LoadedModel:
    """A model in memory.

    Attributes:
        path: where it came from.
        model: weights loaded, in eval mode.
        packed: its projections are codes: it runs, and cannot be trained.
        quant, tokenizer, info, tokenizer_sha256: as in `Source`.
    """

    path: Path
    model: CausalLM
    quant: QuantConfig
    tokenizer: Tokenizer | None
    info: dict[str, Any]
    packed: bool
    tokenizer_sha256: str | None

    @property
    def config(self) -> ModelConfig:
        """The sizes."""
        return self.model.config


def load(source: Source) -> LoadedModel:
    """Build the network of `source` with its weights; nothing is initialised first."""
    model = build_model(source.config, source.quant, device="meta")
    fill(model, source)
    model.tie_weights()
    model.model.reset_rotary()
    model.eval()
    sha256 = source.tokenizer.sha256 if source.tokenizer else source.tokenizer_sha256
    return LoadedModel(source.path, model, source.quant, source.tokenizer, source.info, source.packed, sha256)


def load_model(checkpoint: str | Path | None, key: str = "checkpoint") -> LoadedModel:
    """A model in memory, from whatever `find_model` takes under `key`."""
    return load(open_source(find_model(checkpoint, key)))
