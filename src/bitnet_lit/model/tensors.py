"""The tensors of a network: one table of their names, shapes, kinds and conditions, in the order of the state dict.

`layers.py` and `transformer.py` compute with these tensors; this table says which there are, so that a model can be
read, checked, counted and run without building it, and without torch. A test builds the network on the meta device for
every combination of the fields that decide about tensors, and compares names, shapes and order.

Everything else follows from the table: parameters and FLOPs (`accounting.py`), what a stored model must hold, which
weights a scheme quantizes, and the names that other formats give each tensor. A format's map of names that lacks a
tensor cannot hold the network; it refuses that tensor by its name.

A new tensor, such as the norm of a new layer, is a row here and a line in `layers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.quant.scheme import is_skipped


class Kind(Enum):
    """What a tensor is for."""

    EMBEDDING = "embedding"
    """Rows of the vocabulary: embed_tokens and lm_head."""
    PROJECTION = "projection"
    """The weight of a linear layer inside a decoder layer: what a scheme quantizes."""
    BIAS = "bias"
    NORM = "norm"


@dataclass(frozen=True)
class TensorSpec:
    """A row of the table.

    Attributes:
        name: in the network, or in the layer where it is part of one.
        shape: names of the properties of `ModelConfig` that give each axis.
        rotary_heads: the property that counts its heads, where its rows are what rotary positions turn. Formats that
            pair the elements of a head otherwise store such rows in another order.
        present: whether a network has it.
    """

    name: str
    kind: Kind
    shape: tuple[str, ...]
    rotary_heads: str | None = None
    present: Callable[[ModelConfig], bool] = lambda config: True


def _has(field: str) -> Callable[[ModelConfig], bool]:
    return lambda config: getattr(config, field)


EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYERS = "model.layers."

BEFORE_LAYERS = (TensorSpec(EMBEDDING, Kind.EMBEDDING, ("vocabulary", "hidden_size")),)
LAYER = (
    TensorSpec("input_layernorm.weight", Kind.NORM, ("hidden_size",)),
    TensorSpec("self_attn.q_proj.weight", Kind.PROJECTION, ("attention_size", "hidden_size"), "num_attention_heads"),
    TensorSpec("self_attn.q_proj.bias", Kind.BIAS, ("attention_size",), "num_attention_heads", _has("qkv_bias")),
    TensorSpec("self_attn.k_proj.weight", Kind.PROJECTION, ("kv_size", "hidden_size"), "num_kv_heads"),
    TensorSpec("self_attn.k_proj.bias", Kind.BIAS, ("kv_size",), "num_kv_heads", _has("qkv_bias")),
    TensorSpec("self_attn.v_proj.weight", Kind.PROJECTION, ("kv_size", "hidden_size")),
    TensorSpec("self_attn.v_proj.bias", Kind.BIAS, ("kv_size",), present=_has("qkv_bias")),
    TensorSpec("self_attn.q_norm.weight", Kind.NORM, ("head_size",), present=_has("qk_norm")),
    TensorSpec("self_attn.k_norm.weight", Kind.NORM, ("head_size",), present=_has("qk_norm")),
    TensorSpec("self_attn.attn_sub_norm.weight", Kind.NORM, ("attention_size",), present=_has("sub_norm")),
    TensorSpec("self_attn.o_proj.weight", Kind.PROJECTION, ("hidden_size", "attention_size")),
    TensorSpec("post_attention_layernorm.weight", Kind.NORM, ("hidden_size",)),
    TensorSpec("mlp.gate_proj.weight", Kind.PROJECTION, ("intermediate_size", "hidden_size")),
    TensorSpec("mlp.up_proj.weight", Kind.PROJECTION, ("intermediate_size", "hidden_size")),
    TensorSpec("mlp.ffn_sub_norm.weight", Kind.NORM, ("intermediate_size",), present=_has("sub_norm")),
    TensorSpec("mlp.down_proj.weight", Kind.PROJECTION, ("hidden_size", "intermediate_size")),
)
AFTER_LAYERS = (
    TensorSpec(FINAL_NORM, Kind.NORM, ("hidden_size",)),
    TensorSpec(HEAD, Kind.EMBEDDING, ("vocabulary", "hidden_size"), present=lambda c: not c.tie_word_embeddings),
)


@dataclass(frozen=True)
class NetworkTensor:
    """A tensor of one network.

    Attributes:
        name: its key in the state dict.
        within: its name in its decoder layer; `name` where it is part of none.
        layer: the number of its decoder layer, from 0; None where it is part of none.
        shape: elements of each axis; (out_features, in_features) of a matrix.
        rotary_heads: how many heads its rows consist of, where rotary positions turn them; None elsewhere.
    """

    name: str
    within: str
    layer: int | None
    kind: Kind
    shape: tuple[int, ...]
    rotary_heads: int | None

    @property
    def size(self) -> int:
        """Elements in it."""
        return math.prod(self.shape)


def _made(specs: tuple[TensorSpec, ...], config: ModelConfig, layer: int | None = None) -> Iterator[NetworkTensor]:
    prefix = "" if layer is None else f"{LAYERS}{layer}."
    for spec in specs:
        if spec.present(config):
            shape = tuple(getattr(config, axis) for axis in spec.shape)
            heads = None if spec.rotary_heads is None else getattr(config, spec.rotary_heads)
            yield NetworkTensor(prefix + spec.name, spec.name, layer, spec.kind, shape, heads)


def layer_tensors(config: ModelConfig, layer: int = 0) -> list[NetworkTensor]:
    """The tensors of one decoder layer; all layers are alike."""
    return list(_made(LAYER, config, layer))


def outer_tensors(config: ModelConfig) -> list[NetworkTensor]:
    """The tensors that belong to no decoder layer; a tied head has no tensor of its own."""
    return [*_made(BEFORE_LAYERS, config), *_made(AFTER_LAYERS, config)]


def network_tensors(config: ModelConfig) -> list[NetworkTensor]:
    """Every tensor of a network, in the order of `CausalLM.state_dict()`; a tied head has none of its own.

    Raises:
        UserError: the vocabulary follows the data, and there is none.
    """
    layers = [tensor for layer in range(config.num_hidden_layers) for tensor in layer_tensors(config, layer)]
    return [*_made(BEFORE_LAYERS, config), *layers, *_made(AFTER_LAYERS, config)]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape by its name, in the order of the state dict."""
    return {tensor.name: tensor.shape for tensor in network_tensors(config)}


def quantized_names(config: ModelConfig, quant: QuantConfig) -> set[str]:
    """The weights that are codes and a scale in the forward pass: linear layers but those that `quant.skip` names."""
    if not quant.scheme.quantizes:
        return set()
    linears = [tensor.name for tensor in network_tensors(config) if tensor.kind is Kind.PROJECTION]
    if not config.tie_word_embeddings:  # a tied head has no weight of its own
        linears.append(HEAD)
    return {name for name in linears if not is_skipped(name.removesuffix(".weight"), quant.skip)}


def own_tensors(config: ModelConfig, quant: QuantConfig) -> dict[str, tuple[int, ...]]:
    """What the layers of a scheme have beside weights and biases (`Scheme.own_tensors`): names and shapes."""
    quantized, found = quantized_names(config, quant), {}
    for tensor in network_tensors(config):
        if tensor.name in quantized:
            for name, shape in quant.scheme.own_tensors(*tensor.shape).items():
                found[f"{tensor.name.removesuffix('weight')}{name}"] = shape
    return found


def unnamed_tensors(config: ModelConfig, names: Collection[str]) -> list[str]:
    """The tensors that a format or an engine has no name for, in the order of the table.

    Args:
        names: what it knows: names within a layer (`self_attn.q_proj.weight`), and those of the outer tensors.
    """
    rows = (*LAYER, *BEFORE_LAYERS, *AFTER_LAYERS)
    return [spec.name for spec in rows if spec.present(config) and spec.name not in names]
