"""Hugging Face folders that others wrote: BitNet in its three spellings, and dense Llama-like models.

BitNet (`quantization_config.quant_method = bitnet`), as `transformers` computes them:

    linear_class    quantization_mode   stored weight                 weight_scale
    autobitlinear   online              latent (bf16 master weights)  -
    autobitlinear   offline             codes, packed or plain        multiplies (BitNet b1.58 2B4T)
    bitlinear       any                 packed codes                  divides

Dense: llama, mistral (the same network), qwen2 (biases on q, k, v), qwen3 (norms on q and k). What this network does
not have (scaled rotary positions, biases elsewhere, other activations) is refused: leaving it out would give other
logits without a word.

`NETWORKS` says which networks `transformers` has, for both ways: which one a folder of its own is, and as which one it
runs a folder of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_lit.checkpoints.config_json import check_config, their_shape
from bitnet_lit.checkpoints.file_names import CONFIG_NAME, folder_tokenizer
from bitnet_lit.checkpoints.formats.format import Tool
from bitnet_lit.checkpoints.safetensors_reader import SafetensorsReader, safetensors_files
from bitnet_lit.checkpoints.stored_model import LONGEST_CONTEXT, StoredModel
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.config.held import ANY, SIZES, Held, Only, refused_fields
from bitnet_lit.errors import UserError
from bitnet_lit.quant.activations import AbsMax
from bitnet_lit.quant.weights import AbsMean, PerTensor

if TYPE_CHECKING:
    from torch import Tensor

OTHER = "bitnet_lit"  # a model type that `transformers` does not know, on purpose: it refuses the folder
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
READ = {**{name: name for name in NETWORKS}, "mistral": "llama"}  # Mistral's is a Llama with a window
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu2": "relu2"}


def network_type(config: ModelConfig) -> str:
    """Which of the networks of `transformers` this is; `OTHER` for none of them."""
    if config.sub_norm and config.attention_size != config.hidden_size:
        return OTHER  # its BitNet has no head_dim of its own
    return next((name for name, held in NETWORKS.items() if not refused_fields(config, held)), OTHER)


def transformers_runs(quant: QuantConfig, packed: bool) -> bool:
    """Whether stock `transformers` computes this quantization: it finds codes by absmean, or is given them."""
    scheme = quant.scheme
    if not scheme.quantizes:
        return True
    given_codes = packed and scheme.is_ternary and scheme.granularity == PerTensor()
    known_rules = (given_codes or scheme.weights == AbsMean()) and scheme.activations == AbsMax(8)
    return known_rules and scheme.is_plain and quant.skip == ["lm_head"]


def transformers_problems(config: ModelConfig, quant: QuantConfig, packed: bool) -> list[str]:
    """Why stock `transformers` does not compute a model, from latent weights or from packed codes."""
    found = []
    if not transformers_runs(quant, packed):
        knows = "ternary codes with one scale for the matrix" if packed else "absmean with one scale for the matrix"
        remedy = "take quant=b158, activation_bits=8 and skip=[lm_head]"
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
    # Its BitNet functions are compiled; compiling would take longer than running them once.
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.float()  # of a quantized model it leaves what is stored in bfloat16
        return model(ids).logits.float()


TRANSFORMERS = Tool("transformers", ("transformers", "accelerate"), _transformers_logits)


def _refuse(raw: dict[str, Any]) -> None:
    """Refuse parts of a network that this one does not have.

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
