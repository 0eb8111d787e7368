"""The model folder: what training leaves behind, what every later command takes, what other tools open.

::

    model/
      config.json             Hugging Face config fields, a quantization_config, and ours under "bitnet_lit"
      model.safetensors       tensor names are Hugging Face's
      tokenizer.model         SentencePiece; its sha256 is in config.json
      generation_config.json

The folder says what it is in the words of `transformers`, so that `AutoModelForCausalLM.from_pretrained` builds the
same network, or refuses:

    sub_norm  quant                        model_type   quantization_config
    true      none                         bitnet       -
    true      b158, absmean, 8 bits        bitnet       bitnet, autobitlinear, online
    false     none                         llama        -
    false     b158, absmean, 8 bits        llama        bitnet, autobitlinear, online
    any       b1, absmedian, other bits    bitnet_lit   bitnet_lit

The last row is a model type that `transformers` does not know, on purpose: it would load such weights without a
word and compute something else. A folder of latent b158 weights without `quantization_config` has the same fault,
which is why that entry is always written.

Weights are *latent*: full precision, so training can go on from them. Nothing here pickles.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitnet_lit.atomic import atomic_folder
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.data.tokenizer import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.model import CausalLM, build_model

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.model"
FORMAT_VERSION = 1


@dataclass
class ModelFolder:
    """An opened model folder.

    Attributes:
        path: the folder.
        model: weights loaded, in eval mode.
        quant: how its projections are quantized.
        tokenizer: None when the folder has none (a model trained on bare token ids).
        info: what training noted beside the sizes (data, step, losses); plain data.
    """

    path: Path
    model: CausalLM
    quant: QuantConfig
    tokenizer: Tokenizer | None
    info: dict[str, Any]

    @property
    def config(self) -> ModelConfig:
        """The sizes."""
        return self.model.config


def transformers_runs(quant: QuantConfig) -> bool:
    """Whether stock `transformers` computes this quantization from latent weights."""
    return quant.name == "none" or (
        quant.name == "b158"
        and quant.weight_scale == "absmean"
        and quant.activation_bits == 8
        and quant.skip == ["lm_head"]
    )


def _describe(config: ModelConfig, quant: QuantConfig, tokenizer: Tokenizer | None, info: dict[str, Any]) -> dict:
    """config.json as a dictionary."""
    described: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": "float32",
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_id,
        "tokenizer_sha256": None if tokenizer is None else tokenizer.sha256,
        "bitnet_lit": {
            "format_version": FORMAT_VERSION,
            "kind": "latent",
            "name": config.name,
            "sub_norm": config.sub_norm,
            "dropout": config.dropout,
            "quant": asdict(quant),
            "info": info,
        },
    }
    if not transformers_runs(quant):
        described["model_type"] = "bitnet_lit"
        described["architectures"] = ["BitNetLitForCausalLM"]
        described["quantization_config"] = {"quant_method": "bitnet_lit", **asdict(quant)}
        return described
    described["model_type"] = "bitnet" if config.sub_norm else "llama"
    described["architectures"] = ["BitNetForCausalLM" if config.sub_norm else "LlamaForCausalLM"]
    if quant.name == "b158":
        described["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
            "modules_to_not_convert": quant.skip,
        }
    return described


def save_model_folder(
    folder: Path,
    model: CausalLM,
    quant: QuantConfig,
    tokenizer: Tokenizer | None,
    info: dict[str, Any] | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write `folder`, replacing an older one in one step.

    Args:
        folder: the target; its parent is made if it is missing.
        model: gives the sizes, and the weights unless `state_dict` does (a sharded run gathers them itself).
        info: plain data to keep in config.json.
    """
    state = model.state_dict() if state_dict is None else state_dict
    if model.config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    described = _describe(model.config, quant, tokenizer, info or {})
    generation = {"bos_token_id": described["bos_token_id"], "eos_token_id": described["eos_token_id"]}
    if tokenizer is not None:
        # Stories are separated by BOS alone in llama2.c's shards, so either ends a text.
        generation["eos_token_id"] = [tokenizer.eos_id, tokenizer.bos_id]
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        (temporary / CONFIG_NAME).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        (temporary / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer.path, temporary / TOKENIZER_NAME)


def read_config(folder: Path) -> tuple[ModelConfig, QuantConfig, dict[str, Any]]:
    """The sizes, the quantization and the raw contents of a folder's config.json.

    Raises:
        UserError: missing, unreadable, or not written by this project.
    """
    path = folder / CONFIG_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        ours = raw["bitnet_lit"]
        sizes = {f.name: raw[f.name] for f in fields(ModelConfig) if f.name in raw}
        for key in ("name", "sub_norm", "dropout"):
            sizes[key] = ours[key]
        return ModelConfig(**sizes), QuantConfig(**ours["quant"]), raw
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): is this a model folder?") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a config.json of this project ({type(error).__name__}: {error}): give a folder that "
            "`python -m bitnet_lit.train` wrote"
        ) from None


def load_model_folder(folder: Path) -> ModelFolder:
    """Open a model folder; the weights are mapped from the file, nothing is initialised first.

    Raises:
        UserError: no model folder, a damaged file, or weights that do not fit the config; one line each.
    """
    config, quant, raw = read_config(folder)
    tokenizer = Tokenizer(folder / TOKENIZER_NAME) if (folder / TOKENIZER_NAME).exists() else None
    if tokenizer is not None and raw.get("tokenizer_sha256") not in (None, tokenizer.sha256):
        raise UserError(
            f"{folder / TOKENIZER_NAME}: not the tokenizer this model was trained with (sha256 "
            f"{tokenizer.sha256[:12]}..., config.json says {raw['tokenizer_sha256'][:12]}...): put the right one there"
        )
    model = build_model(config, quant, device="meta")
    _load_weights(model, folder / WEIGHTS_NAME)
    model.eval()
    return ModelFolder(folder, model, quant, tokenizer, raw["bitnet_lit"].get("info", {}))


def _load_weights(model: CausalLM, path: Path) -> None:
    """Fill a model built on the meta device from a safetensors file."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != expected:
                differing = sorted(set(found.items()) ^ set(expected.items()))
                name = differing[0][0]
                raise UserError(
                    f"{path}: tensor {name} is {found.get(name, 'missing')} but config.json says "
                    f"{expected.get(name, 'there is none')}: the two files are not of one model"
                )
            state = {name: file.get_tensor(name).float() for name in found}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): is this a model folder?") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error}): copy or export it again") from None
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.reset_rotary()
