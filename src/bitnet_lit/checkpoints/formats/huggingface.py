"""Hugging Face folders are read here: the three kinds of BitNet folders, and dense Llama-like models.

`transformers` distinguishes these BitNet folders (`quantization_config.quant_method = bitnet`):

    linear_class    quantization_mode   stored weight                 weight_scale
    autobitlinear   online              latent (bf16 master weights)  -
    autobitlinear   offline             codes, packed or plain        multiplies (BitNet b1.58 2B4T)
    bitlinear       any                 packed codes                  divides

The dense models are llama, mistral (the same network), qwen2 (biases on q, k, v) and qwen3 (norms on q and k). A part
that our network does not have (scaled rotary positions, biases elsewhere, other activations) is refused, because
leaving it out would silently give other logits.

`NETWORKS` lists the networks of `transformers` that our network can be. It is used in both directions: to read a folder
of `transformers`, and to find the network as which `transformers` runs a folder of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_lit.checkpoints.config_json import check_config, their_shape
from bitnet_lit.checkpoints.file_names import CONFIG_NAME, folder_tokenizer
from bitnet_lit.checkpoints.formats.format import Tool
from bitnet_lit.checkpoints.plausible_sizes import LONGEST_CONTEXT
from bitnet_lit.checkpoints.safetensors_reader import SafetensorsReader, safetensors_files
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.config.held import ANY, SIZES, Held, Only, refused_fields
from bitnet_lit.errors import UserError
from bitnet_lit.quant.activations import AbsMax
from bitnet_lit.quant.weights import AbsMean, PerTensor

if TYPE_CHECKING:
    from torch import Tensor

OTHER = "bitnet_lit"  # unknown to `transformers` on purpose, so that it refuses the folder
_ALL: Held = {**SIZES, **dict.fromkeys(("rope_theta", "rms_norm_eps", "hidden_act", "tie_word_embeddings"), ANY)}


def _network(sub_norm: bool, qkv_bias: bool, qk_norm: bool) -> Held:
    parts = {"sub_norm": sub_norm, "qkv_bias": qkv_bias, "qk_norm": qk_norm}
    return {**_ALL, **{key: Only(value, "another network") for key, value in parts.items()}}


# The networks of `transformers` that this project's network can be, each an allow-list of its fields.
NETWORKS: dict[str, Held] = {
    "bitnet": _network(sub_norm=True, qkv_bias=False, qk_norm=False),
    "llama": _network(sub_norm=False, qkv_bias=False, qk_norm=False),
    "qwen2": _network(sub_norm=False, qkv_bias=True, qk_norm=False),
    "qwen3": _network(sub_norm=False, qkv_bias=False, qk_norm=True),
}
READ = {**{name: name for name in NETWORKS}, "mistral": "llama"}  # Mistral is a Llama with a sliding window
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu2": "relu2"}


def network_type(config: ModelConfig) -> str:
    """Return the `model_type` of `transformers` that computes this network; `OTHER` if there is none."""
    if config.sub_norm and config.attention_size != config.hidden_size:
        return OTHER  # BitNet in `transformers` has no head_dim
    return next((name for name, held in NETWORKS.items() if not refused_fields(config, held)), OTHER)


def transformers_runs(quant: QuantConfig, packed: bool) -> bool:
    """Return whether unmodified `transformers` computes this quantization, from latent weights or from packed codes."""
    scheme = quant.scheme
    if not scheme.quantizes:
        return True
    given_codes = packed and scheme.is_ternary and scheme.granularity == PerTensor()
    known_rules = (given_codes or scheme.weights == AbsMean()) and scheme.activations == AbsMax(8)
    return known_rules and scheme.is_plain and quant.skip == ["lm_head"]


def transformers_problems(config: ModelConfig, quant: QuantConfig, packed: bool) -> list[str]:
    """List why unmodified `transformers` does not compute a model, from latent weights or from packed codes."""
    found = []
    if not transformers_runs(quant, packed):
        knows = "ternary codes with one scale for the matrix" if packed else "absmean with one scale for the matrix"
        remedy = "train with quant=b158 quant.activation_bits=8 quant.skip=[lm_head]"
        if transformers_runs(quant, True):
            remedy = "packed codes run there"
        found.append(
            f"quant={quant.scheme}, skip={quant.skip}: transformers knows {knows}, activations of 8 bits, and a dense "
            f"lm_head: {remedy}"
        )
    if network_type(config) == OTHER:
        known = {field for held in NETWORKS.values() for field in held}
        unknown = refused_fields(config, dict.fromkeys(known, ANY))
        found += unknown or ["model.sub_norm=true with qkv_bias, qk_norm or head_dim: no such network in transformers"]
    return found


def _transformers_logits(folder: Path, ids: Tensor) -> Tensor:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # The BitNet functions of `transformers` are compiled, which would take longer than running them once.
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.float()  # a quantized model keeps parameters stored in bfloat16
        return model(ids).logits.float()


TRANSFORMERS = Tool("transformers", ("transformers", "accelerate"), _transformers_logits)


def _refuse(raw: dict[str, Any]) -> None:
    """Refuse a config.json with parts that our network does not have.

    Raises:
        UserError: there is such a part; the message names the first one.
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
        context = min(context, raw["sliding_window"])  # within the window, attention sees the whole context
    rope = raw.get("rope_parameters") or {}
    parts = {key: part.value for key, part in NETWORKS[READ[raw["model_type"]]].items() if isinstance(part, Only)}
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
        **parts,
    )


def _quant(raw: dict[str, Any]) -> tuple[QuantConfig, bool]:
    """Return the quantization of the projections, and whether codes are divided by their stored scale."""
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
    """Open a folder whose config.json is one of `transformers`.

    Raises:
        UserError: the network or the quantization is not supported, or a file cannot be read.
    """
    path = folder / CONFIG_NAME
    if isinstance(raw.get("model_type"), str) and raw["model_type"] not in READ:
        raise UserError(f"{path}: model_type={raw['model_type']}: not known here: {', '.join(READ)} are")
    check_config(path, raw, their_shape())
    try:
        _refuse(raw)
        quant, inverse_scales = _quant(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}: take another model") from None
    try:
        config = _sizes(folder, raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    reader = SafetensorsReader(safetensors_files(folder))
    return StoredModel(folder, config, quant, folder_tokenizer(folder), {}, reader, inverse_scales)
