"""The model folder: what training leaves behind, what every later command takes, what other tools open.

::

    model/
      config.json             Hugging Face config fields, a quantization_config, and ours under "bitnet_lit"
      model.safetensors       tensor names are Hugging Face's
      tokenizer.model         SentencePiece (or tokenizer.json); its sha256 is in config.json
      generation_config.json

Two kinds: *latent* (full precision, training can go on from it) and *packed* (codes and scales, runs only; the
layout is in `quant/packing.py`). The folder says what it is in the words of `transformers`, so that
`AutoModelForCausalLM.from_pretrained` builds the same network, or refuses:

    kind     quant                                  model_type   quantization_config
    latent   nothing is rounded                     (network)    -
    latent   absmean, 8 bits                        (network)    bitnet, autobitlinear, online
    latent   any other scheme                       bitnet_lit   bitnet_lit
    packed   ternary, one scale a matrix, 8 bits    (network)    bitnet, autobitlinear, offline
    packed   any other scheme                       bitnet_lit   bitnet_lit

(network) is bitnet with sub-norms, and without them llama, qwen2 (biases on q, k, v) or qwen3 (norms on q, k).
`bitnet_lit` is a model type that `transformers` does not know, on purpose: it would load such weights without a word
and compute something else. A folder of latent b158 weights without `quantization_config` has the same fault, which is
why that entry is always written. Packed codes carry their scales, so there the rule that found them does not matter.

The scheme stands there by its name and its settings (`QuantConfig.describe`). A name that is not known here is refused:
nothing that a folder names is imported.

Nothing here pickles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bitnet_lit.checkpoints.config_json import FORMAT_VERSION, check_config, our_shape, read_raw_config
from bitnet_lit.checkpoints.file_names import CONFIG_NAME, GENERATION_NAME, WEIGHTS_NAME, folder_tokenizer
from bitnet_lit.checkpoints.formats.format import Format, Tool
from bitnet_lit.checkpoints.formats.huggingface import OTHER, TRANSFORMERS, network_type, transformers_runs
from bitnet_lit.checkpoints.safetensors_reader import SafetensorsReader, safetensors_files
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.config.checks import one_of
from bitnet_lit.data.tokenizers import Tokenizer, tokenizer_file_names
from bitnet_lit.errors import UserError

# Where a field of the network stands in config.json: beside Hugging Face's under the name that both give it, or under
# "bitnet_lit". What is in neither tuple goes there too, so a new field is saved without a word here.
THEIR_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("rope_theta", "tie_word_embeddings"),
)
FIRST_KEYS = ("name", "sub_norm", "qkv_bias", "qk_norm", "dropout")  # always written, since the first version
NOT_SAVED = ("gradient_checkpointing",)  # changes the memory of a run, and no number
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
    """config.json as a dictionary; of `info` what is no path of this machine."""
    written = {key: getattr(config, key) for key in THEIR_KEYS}
    written |= {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_size}  # as numbers
    described: dict[str, Any] = {
        **written,  # rope_theta among them, which transformers 5 reads below
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_id,
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
    """The fields that stand under "bitnet_lit": all that neither Hugging Face has nor the run alone."""
    return [each.name for each in fields(ModelConfig) if each.name not in THEIR_KEYS and each.name not in NOT_SAVED]


def _our_values(config: ModelConfig) -> dict[str, Any]:
    """Those fields; one that earlier versions do not know only where it is not at its default, so that they can read
    the folder as long as it needs no more than they know."""
    defaults = type(config)()
    values = {key: getattr(config, key) for key in _our_keys()}
    return {key: value for key, value in values.items() if key in FIRST_KEYS or value != getattr(defaults, key)}


def our_configs(path: Path, raw: dict[str, Any]) -> tuple[ModelConfig, QuantConfig]:
    """Sizes and quantization of a config.json that this project wrote.

    Raises:
        UserError: values that do not fit, or what a later version wrote.
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


# A part that is matched in one pass: a text in a folder of somebody else's may be long.
PATH_IN_TEXT = re.compile(r"(?<![^\s'\"(=])(?:[A-Za-z]:[\\/]|~?/)[^\s'\"),;]*")


def _last_part(path: re.Match[str]) -> str:
    name = re.split(r"[/\\]", path[0].rstrip("/\\"))[-1]
    return path[0] if name in ("", "~") or name.endswith(":") else name


def public_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """Leave the paths of this machine out of what training noted: a model folder is given to others.

    Of a path its last part stays, and of the folder of the data its name, under "data".
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
    """The names in a model folder that this project wrote; the others are its user's.

    A tokenizer that the config does not know of was put there by the user, and so were the files that go with a
    tokenizer.json where the model came with a tokenizer.model.
    """
    names = {CONFIG_NAME, WEIGHTS_NAME, GENERATION_NAME}
    try:
        if read_raw_config(folder).get("tokenizer_sha256") is None:
            return names
    except UserError:
        pass  # damaged, as a kill of an old version's could leave it
    return names | set(tokenizer_file_names(folder))


def open_model_folder(folder: Path, raw: dict[str, Any]) -> StoredModel:
    """A folder that this project wrote, latent or packed.

    Raises:
        UserError: a damaged file, or weights that do not fit the config; one line each.
    """
    config, quant = our_configs(folder / CONFIG_NAME, raw)
    info = raw["bitnet_lit"].get("info", {})
    reader = SafetensorsReader(safetensors_files(folder))
    expected = raw.get("tokenizer_sha256")
    return StoredModel(folder, config, quant, folder_tokenizer(folder), info, reader, tokenizer_sha256=expected)


def trained_step(folder: Path) -> int | None:
    """The optimizer step at which a run wrote a model folder; None where there is no whole folder of a run."""
    try:
        step = read_raw_config(folder)["bitnet_lit"]["info"]["step"]
    except (UserError, LookupError, TypeError):
        return None
    return step if isinstance(step, int) and (folder / WEIGHTS_NAME).is_file() else None


@dataclass(frozen=True)
class ModelFolder(Format):
    """What the latent and the packed folder have in common."""

    library = "transformers"

    dtype: str = "float32"
    """Of everything that is no packed code: float32 or bfloat16."""

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, ("float32", "bfloat16"))

    def problems(self, config: ModelConfig, quant: QuantConfig) -> list[str]:
        """None: every field of a network is carried, those that `transformers` does not know under "bitnet_lit"."""
        return []

    @property
    def tool(self) -> Tool:
        """Stock `transformers`."""
        return TRANSFORMERS

    def reopen(self, out: Path, stored: StoredModel) -> StoredModel:
        """The folder as every command opens it."""
        return open_model_folder(out, read_raw_config(out))

    @classmethod
    def earlier_names(cls, folder: Path) -> set[str]:
        """See `written_names`."""
        return written_names(folder)

    def how_to_run(self, repository: str, runs_there: bool) -> Iterator[str]:
        """`transformers` where it computes the model, and this project."""
        if runs_there:
            yield (
                "```python\nfrom transformers import AutoModelForCausalLM  # with the package accelerate\n\n"
                f'model = AutoModelForCausalLM.from_pretrained("{repository}")\n```'
            )
        yield from super().how_to_run(repository, runs_there)
