"""Hugging Face folders that others wrote: BitNet in its three spellings, and dense Llama-like models.

BitNet (`quantization_config.quant_method = bitnet`), as `transformers` computes them:

    linear_class    quantization_mode   stored weight                 weight_scale
    autobitlinear   online              latent (bf16 master weights)  -
    autobitlinear   offline             codes, packed or plain        multiplies (BitNet b1.58 2B4T)
    bitlinear       any                 packed codes                  divides

Dense: llama, mistral (the same network), qwen2 (biases on q, k, v), qwen3 (norms on q and k). What this network does
not have (scaled rotary positions, biases elsewhere, other activations) is refused: leaving it out would give other
logits without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitnet_lit.checkpoints.config_json import CONFIG_NAME, check_config, their_shape
from bitnet_lit.checkpoints.formats.model_folder import folder_tokenizer
from bitnet_lit.checkpoints.safetensors_reader import SafetensorsReader, safetensors_files
from bitnet_lit.checkpoints.stored_model import LONGEST_CONTEXT, StoredModel
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.errors import UserError

KNOWN_TYPES = ("bitnet", "llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu2": "relu2"}


def _refuse(raw: dict[str, Any]) -> None:
    """Parts of a network that are not here.

    Raises:
        UserError: the first of them.
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UserError(f"rotary positions of type {rope_type}: only the default ones are known here")
    if raw.get("use_sliding_window"):
        raise UserError("use_sliding_window=true: attention here sees the whole context")
    if raw["model_type"] != "qwen2" and raw.get("attention_bias"):
        raise UserError("attention_bias=true: biases are known on q, k and v of qwen2 only")
    if raw.get("mlp_bias"):
        raise UserError("mlp_bias=true: the feed-forward layer here has no biases")
    if raw["hidden_act"] not in ACTIVATIONS:
        raise UserError(f"hidden_act={raw['hidden_act']}: {', '.join(ACTIVATIONS)} are known here")


def _sizes(folder: Path, raw: dict[str, Any]) -> ModelConfig:
    context = raw["max_position_embeddings"]
    if raw["model_type"] == "mistral" and raw.get("sliding_window"):
        context = min(context, raw["sliding_window"])  # within the window attention sees everything
    rope = raw.get("rope_parameters") or {}
    return ModelConfig(
        name=folder.name,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw.get("num_key_value_heads"),
        head_dim=raw.get("head_dim"),
        max_position_embeddings=min(context, LONGEST_CONTEXT),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rms_norm_eps=raw["rms_norm_eps"],
        hidden_act=ACTIVATIONS[raw["hidden_act"]],
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        sub_norm=raw["model_type"] == "bitnet",
        qkv_bias=raw["model_type"] == "qwen2",
        qk_norm=raw["model_type"] == "qwen3",
    )


def _quant(raw: dict[str, Any]) -> tuple[QuantConfig, bool]:
    """How the projections are quantized, and whether stored scales divide."""
    quantization = raw.get("quantization_config")
    if quantization is None:
        return QuantConfig(name="none"), False
    method = quantization.get("quant_method")
    if method != "bitnet":
        raise UserError(f"quantization_config.quant_method={method}: only bitnet is known here")
    if quantization.get("use_rms_norm"):
        raise UserError("quantization_config.use_rms_norm=true: a norm inside each projection is not known here")
    skip = quantization.get("modules_to_not_convert")
    skip = ["lm_head"] if skip is None else list(skip)
    linear_class, mode = quantization.get("linear_class", "bitlinear"), quantization.get("quantization_mode", "offline")
    if raw["model_type"] == "qwen2" and (linear_class, mode) == ("autobitlinear", "offline"):
        raise UserError("quantized qwen2: its biases are multiplied by the scale of the codes, which is not known here")
    return QuantConfig(name="b158", skip=skip), linear_class == "bitlinear"


def open_hub_folder(folder: Path, raw: dict[str, Any]) -> StoredModel:
    """A folder with a config.json of `transformers`.

    Raises:
        UserError: a network, a quantization or a file that cannot be read; one line each.
    """
    path = folder / CONFIG_NAME
    if isinstance(raw.get("model_type"), str) and raw["model_type"] not in KNOWN_TYPES:
        raise UserError(f"{path}: model_type={raw['model_type']}: not known here: {', '.join(KNOWN_TYPES)} are")
    check_config(path, raw, their_shape())
    try:
        _refuse(raw)
        config = _sizes(folder, raw)
        quant, inverse_scales = _quant(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    reader = SafetensorsReader(safetensors_files(folder))
    return StoredModel(folder, config, quant, folder_tokenizer(folder), {}, reader, inverse_scales)
