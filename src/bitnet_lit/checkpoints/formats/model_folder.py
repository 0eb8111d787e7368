"""Training writes a model folder, every later command takes one, and other tools open it.

::

    model/
      config.json             Hugging Face config fields, a quantization_config, and ours under "bitnet_lit"
      model.safetensors       tensor names are Hugging Face's
      tokenizer.model         SentencePiece (or tokenizer.json); its sha256 is in config.json
      generation_config.json

There are two kinds. A *latent* folder holds full-precision weights, from which training can continue. A *packed* folder
holds codes and scales, which can only be run (`quant/packing.py` has the layout). The config describes the model in the
terms of `transformers`, so that `AutoModelForCausalLM.from_pretrained` either builds the same network or refuses:

    kind     quant                                  model_type   quantization_config
    latent   no quantization                        (network)    -
    latent   absmean, 8 bits                        (network)    bitnet, autobitlinear, online
    latent   any other scheme                       bitnet_lit   bitnet_lit
    packed   ternary, one scale a matrix, 8 bits    (network)    bitnet, autobitlinear, offline
    packed   any other scheme                       bitnet_lit   bitnet_lit

(network) is bitnet with sub-norms, and without them llama, qwen2 (biases on q, k, v) or qwen3 (norms on q, k).
`transformers` does not know the model type `bitnet_lit`, on purpose: under a known type it would silently load such
weights and compute something else. The same would happen to latent b158 weights without a `quantization_config`, so
that entry is always written. Packed codes are stored with their scales, so the rule that computed them does not matter.

The config names the scheme and its settings (`QuantConfig.describe`). An unknown name is refused, and nothing that a
folder names is imported. No file is a pickle.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bitnet_lit.checkpoints.config_json import FORMAT_VERSION, check_config, our_shape, read_raw_config
from bitnet_lit.checkpoints.file_names import CONFIG_NAME, GENERATION_NAME, WEIGHTS_NAME, folder_tokenizer
from bitnet_lit.checkpoints.formats.format import Format, Tool, infer_command
from bitnet_lit.checkpoints.formats.huggingface import OTHER, TRANSFORMERS, network_type, transformers_runs
from bitnet_lit.checkpoints.safetensors_reader import SafetensorsReader, safetensors_files
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.config.checks import one_of
from bitnet_lit.data.tokenizers import Tokenizer, tokenizer_file_names
from bitnet_lit.errors import UserError

# These fields of the network have Hugging Face's names and stand at the top level of config.json. All other fields
# stand under "bitnet_lit", so a new field is saved without a change here.
THEIR_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("rope_theta", "tie_word_embeddings"),
)
FIRST_KEYS = ("name", "sub_norm", "qkv_bias", "qk_norm", "dropout")  # known to all versions, and always written
NOT_SAVED = ("gradient_checkpointing",)  # changes the memory of a run, but no result
ARCHITECTURES = {
    "bitnet": "BitNetForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    OTHER: "BitNetLitForCausalLM",
}


def describe(
    config: ModelConfig,
    quant: QuantConfig,
    tokenizer: Tokenizer | None,
    info: dict[str, Any],
    packed: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Return the content of config.json; paths of this machine are removed from `info`."""
    written = {key: getattr(config, key) for key in THEIR_KEYS}
    written |= {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_size}  # as numbers, never None
    described: dict[str, Any] = {
        **written,  # includes rope_theta, which transformers 5 reads below
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": None if tokenizer is None or tokenizer.eos_id < 0 else tokenizer.eos_id,
        "tokenizer_sha256": None if tokenizer is None else tokenizer.sha256,
        "bitnet_lit": {
            "format_version": FORMAT_VERSION,
            "kind": "packed" if packed else "latent",
            **_our_values(config),
            "quant": quant.describe(),
            "info": public_info(info),
        },
    }
    model_type = network_type(config) if transformers_runs(quant, packed) else OTHER
    described["model_type"] = model_type
    described["architectures"] = [ARCHITECTURES[model_type]]
    if model_type == OTHER:
        described["quantization_config"] = {"quant_method": "bitnet_lit", **quant.describe()}
    elif quant.scheme.quantizes:
        described["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline" if packed else "online",
            "modules_to_not_convert": quant.skip,
        }
    return described


def _our_keys() -> list[str]:
    """Return the names of the fields that stand under "bitnet_lit" in config.json."""
    return [each.name for each in fields(ModelConfig) if each.name not in THEIR_KEYS and each.name not in NOT_SAVED]


def _our_values(config: ModelConfig) -> dict[str, Any]:
    """Return the fields under "bitnet_lit" and their values.

    A field that earlier versions do not know is left out where it has its default, so that they can read the folder.
    """
    defaults = type(config)()
    values = {key: getattr(config, key) for key in _our_keys()}
    return {key: value for key, value in values.items() if key in FIRST_KEYS or value != getattr(defaults, key)}


def our_configs(path: Path, raw: dict[str, Any]) -> tuple[ModelConfig, QuantConfig]:
    """Return sizes and quantization from a config.json that this project wrote.

    Raises:
        UserError: a value does not fit, or a later version wrote the file.
    """
    check_config(path, raw, our_shape(_our_keys()))
    ours = raw["bitnet_lit"]
    if ours.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise UserError(
            f"{path}: written by a later version (format {ours['format_version']}, this one knows {FORMAT_VERSION}): "
            "upgrade bitnet-lit"
        )
    if unknown := sorted(ours.keys() - {*_our_keys(), "format_version", "kind", "quant", "info"}):
        raise UserError(
            f"{path}: bitnet_lit.{unknown[0]}={ours[unknown[0]]!r} is not known here: written by a later version: "
            "upgrade bitnet-lit"
        )
    values = {key: raw[key] for key in THEIR_KEYS if raw.get(key) is not None}
    values |= {key: ours[key] for key in _our_keys() if key in ours}
    try:
        return ModelConfig(**values), QuantConfig.described(ours["quant"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# The expression takes linear time, because a text in somebody else's folder may be long.
PATH_IN_TEXT = re.compile(r"(?<![^\s'\"(=])(?:[A-Za-z]:[\\/]|~?/)[^\s'\"),;]*")


def _last_part(path: re.Match[str]) -> str:
    name = re.split(r"[/\\]", path[0].rstrip("/\\"))[-1]
    return path[0] if name in ("", "~") or name.endswith(":") else name


def public_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten paths in what training recorded to their last part, because a model folder is given to others.

    The name of the data folder (`data_dir`) is returned as "data".
    """

    def cleaned(value: Any) -> Any:
        if isinstance(value, str):
            whole = os.path.isabs(value) or value.startswith("~/")
            return os.path.basename(value.rstrip("/")) if whole else PATH_IN_TEXT.sub(_last_part, value)
        if isinstance(value, Mapping):
            return {str(key): cleaned(item) for key, item in value.items()}
        return [cleaned(item) for item in value] if isinstance(value, list | tuple) else value

    public = {key: cleaned(value) for key, value in info.items() if key != "data_dir"}
    if isinstance(data := info.get("data_dir"), str):
        public["data"] = os.path.basename(data.rstrip("/"))
    return public


def written_names(folder: Path) -> set[str]:
    """Return the names in a model folder that this project wrote; all others are the user's.

    If config.json does not mention a tokenizer, the user has put it there. The same is true of the files that belong to
    a tokenizer.json if the model was written with a tokenizer.model.
    """
    names = {CONFIG_NAME, WEIGHTS_NAME, GENERATION_NAME}
    try:
        if read_raw_config(folder).get("tokenizer_sha256") is None:
            return names
    except UserError:
        pass  # a killed earlier version could leave a damaged file
    return names | set(tokenizer_file_names(folder))


def open_model_folder(folder: Path, raw: dict[str, Any]) -> StoredModel:
    """Open a latent or packed folder that this project wrote.

    Args:
        raw: the content of config.json.

    Raises:
        UserError: a file is damaged, or the weights do not fit the config.
    """
    config, quant = our_configs(folder / CONFIG_NAME, raw)
    info = raw["bitnet_lit"].get("info", {})
    reader = SafetensorsReader(safetensors_files(folder))
    expected = raw.get("tokenizer_sha256")
    return StoredModel(folder, config, quant, folder_tokenizer(folder), info, reader, tokenizer_sha256=expected)


def trained_step(folder: Path) -> int | None:
    """Return the optimizer step at which a run wrote a model folder; None where no run wrote the whole folder."""
    try:
        step = read_raw_config(folder)["bitnet_lit"]["info"]["step"]
    except (UserError, LookupError, TypeError):
        return None
    return step if isinstance(step, int) and (folder / WEIGHTS_NAME).is_file() else None


@dataclass(frozen=True)
class ModelFolder(Format):
    """Implements what the latent and the packed folder have in common."""

    library = "transformers"

    dtype: str = "float32"
    """The dtype of everything but codes and scales: float32 or bfloat16."""

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, ("float32", "bfloat16"))

    def problems(self, config: ModelConfig, quant: QuantConfig) -> list[str]:
        """Return an empty list: the folder holds every field of a network."""
        return []

    @property
    def tool(self) -> Tool:
        """Unmodified `transformers`."""
        return TRANSFORMERS

    def reopen(self, out: Path, stored: StoredModel) -> StoredModel:
        """Open the folder as every command does."""
        return open_model_folder(out, read_raw_config(out))

    @classmethod
    def earlier_names(cls, folder: Path) -> set[str]:
        """Return the names in the folder that this project wrote."""
        return written_names(folder)

    def next_command(self, out: Path, schemes: Sequence[str]) -> list[str]:
        """Return the command of this project."""
        return infer_command(out, schemes)

    def how_to_run(self, repository: str, runs_there: bool) -> Iterator[str]:
        """Yield how to run the export with `transformers`, where it computes the model, and with this project."""
        if runs_there:
            yield (
                "```python\nfrom transformers import AutoModelForCausalLM  # with the package accelerate\n\n"
                f'model = AutoModelForCausalLM.from_pretrained("{repository}")\n```'
            )
        yield from super().how_to_run(repository, runs_there)
