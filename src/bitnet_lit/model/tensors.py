"""Names and shapes of a network's tensors, from its config alone: those of `CausalLM.state_dict()`, in its order.

Reading a model begins with them, so a model can be read, checked and run without building the network.
"""

from __future__ import annotations

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.quant.scheme import is_skipped

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def projection_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of a layer's seven projections, by their names in the layer."""
    hidden, keys = config.hidden_size, config.num_kv_heads * config.head_size
    return {
        "self_attn.q_proj": (config.attention_size, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, config.attention_size),
        "mlp.gate_proj": (config.intermediate_size, hidden),
        "mlp.up_proj": (config.intermediate_size, hidden),
        "mlp.down_proj": (hidden, config.intermediate_size),
    }


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape by its name; a tied head is left out."""
    assert config.vocab_size is not None
    hidden, projections = config.hidden_size, projection_shapes(config)
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name in ("q_proj", "k_proj", "v_proj"):
        rows, _ = layer[f"self_attn.{name}.weight"] = projections[f"self_attn.{name}"]
        if config.qkv_bias:
            layer[f"self_attn.{name}.bias"] = (rows,)
    if config.qk_norm:
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (config.head_size,)
    if config.sub_norm:
        layer["self_attn.attn_sub_norm.weight"] = (config.attention_size,)
    layer["self_attn.o_proj.weight"] = projections["self_attn.o_proj"]
    layer["post_attention_layernorm.weight"] = (hidden,)
    for name in ("gate_proj", "up_proj"):
        layer[f"mlp.{name}.weight"] = projections[f"mlp.{name}"]
    if config.sub_norm:
        layer["mlp.ffn_sub_norm.weight"] = (config.intermediate_size,)
    layer["mlp.down_proj.weight"] = projections["mlp.down_proj"]
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def quantized_names(config: ModelConfig, quant: QuantConfig) -> set[str]:
    """The weights that are codes and a scale in the forward pass: linear layers but those that `quant.skip` names."""
    if not quant.scheme.quantizes:
        return set()
    linears = [
        f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in projection_shapes(config)
    ]
    if not config.tie_word_embeddings:  # a tied head has no weight of its own
        linears.append(HEAD.removesuffix(".weight"))
    return {f"{name}.weight" for name in linears if not is_skipped(name, quant.skip)}
