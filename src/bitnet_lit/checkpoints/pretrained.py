"""A stored model is loaded into a network in memory, like `from_pretrained` of `transformers`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bitnet_lit.checkpoints.locate import find_model, open_stored
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.model import CausalLM, build_model
from bitnet_lit.quant import BitLinear, PackedBitLinear


def fill(module: nn.Module, stored: StoredModel, prefix: str = "") -> nn.Module:
    """Load the weights of a module that was built on the meta device, and return the module.

    Args:
        module: the network of `stored` or a part of it. Latent projections stay trainable; for packed codes they are
            replaced by `PackedBitLinear`.
        prefix: the prefix of the module's names in the network ("model.layers.3.").
    """
    for name, layer in list(module.named_modules()):
        weight = f"{prefix}{name}.weight"
        if stored.packed and isinstance(layer, BitLinear) and weight in stored.quantized:
            bias = None if layer.bias is None else stored.tensor(f"{prefix}{name}.bias")
            module.set_submodule(name, PackedBitLinear(*stored.packed_codes(weight), bias, layer.scheme))
    for name in [name for name, _ in module.named_parameters()]:
        if prefix + name in stored.tensors:
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(stored.tensor(prefix + name))
            setattr(module.get_submodule(owner), leaf, parameter)
    for name in [name for name, _ in module.named_buffers()]:
        owner, _, leaf = name.rpartition(".")
        layer = module.get_submodule(owner)
        if prefix + name in stored.tensors and not isinstance(layer, PackedBitLinear):  # of a scheme's own layer
            setattr(layer, leaf, stored.tensor(prefix + name))
    return module


@dataclass
class PretrainedModel:
    """Holds a model in memory.

    Attributes:
        path: the folder or file that it was loaded from.
        model: the network with its weights, in eval mode.
        packed: whether its projections are codes; then the model runs but cannot be trained.
        quant, tokenizer, info, tokenizer_sha256: as in `StoredModel`.
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
        """The config of the network."""
        return self.model.config


def build_pretrained(stored: StoredModel) -> PretrainedModel:
    """Build the network of `stored` with its weights, without a random initialisation first."""
    model = build_model(stored.config, stored.quant, device="meta")
    fill(model, stored)
    model.tie_weights()
    model.model.reset_rotary()
    model.eval()
    sha256 = stored.tokenizer.sha256 if stored.tokenizer else stored.tokenizer_sha256
    return PretrainedModel(stored.path, model, stored.quant, stored.tokenizer, stored.info, stored.packed, sha256)


def from_pretrained(checkpoint: str | Path | None, key: str = "checkpoint") -> PretrainedModel:
    """Load a model into memory; `find_model` says what `checkpoint` and `key` are, and which errors are raised."""
    return build_pretrained(open_stored(find_model(checkpoint, key)))
