"""This module has one table of all tensors of a network: names, shapes, kinds and conditions, in state dict order.

`layers.py` and `transformer.py` compute with these tensors. The table lists them, so that a model can be read, checked,
counted and run without torch and without building the network. A test builds the network on the meta device for every
combination of the fields that add or remove tensors, and compares names, shapes and order.

Other code derives what it needs from the table: parameters and FLOPs (`accounting.py`), the tensors that a stored model
must have, and the weights that a scheme quantizes. A format maps these names to its own. Where its map lacks a tensor
of a network, it refuses the network and names that tensor.

A new tensor, such as the norm of a new layer, needs a row here and a line in `layers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.quant.scheme import is_skipped


class Kind(Enum):
    """A kind says what a tensor is for."""

    EMBEDDING = "embedding"
    """A matrix with one row per token of the vocabulary: embed_tokens, lm_head and value embeddings."""
    PROJECTION = "projection"
    """The weight of a linear layer in a decoder layer, which a scheme quantizes."""
    GATE = "gate"
    """A small matrix that no scheme quantizes."""
    BIAS = "bias"
    NORM = "norm"
    SCALE = "scale"
    """One number."""


@dataclass(frozen=True)
class TensorSpec:
    """A TensorSpec is a row of the table.

    Attributes:
        name: its name in the network, or in the decoder layer where it belongs to one.
        shape: for each axis, its size, or the attribute of `ModelConfig` that has it.
        rotary_heads: the attribute of `ModelConfig` that has its number of heads, where the rotary embedding rotates
            what its rows produce; otherwise None. Formats that rotate other pairs of elements permute such rows.
        present: returns whether the network of a config has this tensor.
        in_layer: returns whether a layer has it, in a network that has it.
    """

    name: str
    kind: Kind
    shape: tuple[str | int, ...]
    rotary_heads: str | None = None
    present: Callable[[ModelConfig], bool] = lambda config: True
    in_layer: Callable[[ModelConfig, int], bool] = lambda config, layer: True


def _has(field: str) -> Callable[[ModelConfig], bool]:
    return lambda config: getattr(config, field)


def _of_value_embedding(name: str, kind: Kind, shape: tuple[str, str]) -> TensorSpec:
    name = f"self_attn.value_embed.{name}"
    return TensorSpec(
        name, kind, shape, present=_has("value_embeddings"), in_layer=lambda config, i: config.has_value_embedding(i)
    )


EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYERS = "model.layers."

BEFORE_LAYERS = (TensorSpec(EMBEDDING, Kind.EMBEDDING, ("vocabulary", "hidden_size")),)
LAYER = (
    TensorSpec("residual_scale", Kind.SCALE, (1,), present=_has("residual_scales")),
    TensorSpec("x0_scale", Kind.SCALE, (1,), present=_has("x0_scales")),
    TensorSpec("input_layernorm.weight", Kind.NORM, ("hidden_size",)),
    TensorSpec("self_attn.q_proj.weight", Kind.PROJECTION, ("attention_size", "hidden_size"), "num_attention_heads"),
    TensorSpec("self_attn.q_proj.bias", Kind.BIAS, ("attention_size",), "num_attention_heads", _has("qkv_bias")),
    TensorSpec("self_attn.k_proj.weight", Kind.PROJECTION, ("kv_size", "hidden_size"), "num_kv_heads"),
    TensorSpec("self_attn.k_proj.bias", Kind.BIAS, ("kv_size",), "num_kv_heads", _has("qkv_bias")),
    TensorSpec("self_attn.v_proj.weight", Kind.PROJECTION, ("kv_size", "hidden_size")),
    TensorSpec("self_attn.v_proj.bias", Kind.BIAS, ("kv_size",), present=_has("qkv_bias")),
    TensorSpec("self_attn.q_norm.weight", Kind.NORM, ("head_size",), present=_has("qk_norm")),
    TensorSpec("self_attn.k_norm.weight", Kind.NORM, ("head_size",), present=_has("qk_norm")),
    _of_value_embedding("gate", Kind.GATE, ("num_kv_heads", "value_gate_inputs")),
    _of_value_embedding("table.weight", Kind.EMBEDDING, ("vocabulary", "kv_size")),
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
    """A NetworkTensor describes one tensor of one network.

    Attributes:
        name: its key in the state dict.
        within: its name in its decoder layer; the same as `name` where it belongs to no layer.
        layer: the index of its decoder layer, from 0; None where it belongs to no layer.
        shape: elements of each axis; (out_features, in_features) for a matrix.
        rotary_heads: the number of heads in its rows, where the rotary embedding rotates them; otherwise None.
    """

    name: str
    within: str
    layer: int | None
    kind: Kind
    shape: tuple[int, ...]
    rotary_heads: int | None

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def _made(specs: tuple[TensorSpec, ...], config: ModelConfig, layer: int | None = None) -> Iterator[NetworkTensor]:
    prefix = "" if layer is None else f"{LAYERS}{layer}."
    for spec in specs:
        if spec.present(config) and (layer is None or spec.in_layer(config, layer)):
            shape = tuple(axis if isinstance(axis, int) else getattr(config, axis) for axis in spec.shape)
            heads = None if spec.rotary_heads is None else getattr(config, spec.rotary_heads)
            yield NetworkTensor(prefix + spec.name, spec.name, layer, spec.kind, shape, heads)


def layer_tensors(config: ModelConfig, layer: int = 0) -> list[NetworkTensor]:
    """Return the tensors of one decoder layer. All layers have the same, but for value embeddings."""
    return list(_made(LAYER, config, layer))


def outer_tensors(config: ModelConfig) -> list[NetworkTensor]:
    """Return the tensors that belong to no decoder layer. A tied lm_head has no tensor of its own.

    Raises:
        UserError: `vocab_size` is None, so the vocabulary is not known.
    """
    return [*_made(BEFORE_LAYERS, config), *_made(AFTER_LAYERS, config)]


def network_tensors(config: ModelConfig) -> list[NetworkTensor]:
    """Return every tensor of a network, in the order of `CausalLM.state_dict()`.

    A tied lm_head has no tensor of its own.

    Raises:
        UserError: `vocab_size` is None, so the vocabulary is not known.
    """
    layers = [tensor for layer in range(config.num_hidden_layers) for tensor in layer_tensors(config, layer)]
    return [*_made(BEFORE_LAYERS, config), *layers, *_made(AFTER_LAYERS, config)]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its name, in the order of the state dict."""
    return {tensor.name: tensor.shape for tensor in network_tensors(config)}


def quantized_names(config: ModelConfig, quant: QuantConfig) -> set[str]:
    """Return the names of the weights that the scheme quantizes: all linear layers except those in `quant.skip`."""
    if not quant.scheme.quantizes:
        return set()
    linears = [tensor.name for tensor in network_tensors(config) if tensor.kind is Kind.PROJECTION]
    if not config.tie_word_embeddings:  # a tied head has no weight of its own
        linears.append(HEAD)
    return {name for name in linears if not is_skipped(name.removesuffix(".weight"), quant.skip)}


def own_tensors(config: ModelConfig, quant: QuantConfig) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of what a scheme's layers have beside weights and biases (`Scheme.own_tensors`)."""
    quantized, found = quantized_names(config, quant), {}
    for tensor in network_tensors(config):
        if tensor.name in quantized:
            for name, shape in quant.scheme.own_tensors(*tensor.shape).items():
                found[f"{tensor.name.removesuffix('weight')}{name}"] = shape
    return found


def unnamed_tensors(config: ModelConfig, names: Collection[str]) -> list[str]:
    """Return the names of the tensors that a format or an engine does not support.

    The names of a decoder layer come first, each once for all layers. The outer tensors follow.

    Args:
        names: the supported names: those within a layer (`self_attn.q_proj.weight`), and those of the outer tensors.
    """
    rows = (*LAYER, *BEFORE_LAYERS, *AFTER_LAYERS)
    return [spec.name for spec in rows if spec.present(config) and spec.name not in names]
