"""A network of the user's own is written to a model folder and read from it here.

::

    model/
      config.json             model_type bitnet_lit; under "bitnet_lit": the network's class and arguments, the scheme
      model.safetensors       the module's state dict
      tokenizer.model         as in every model folder

The folder names the class as text. It is imported only if the user names it too (`networks=[my_project.Mixer]`); the
same rule holds for schemes. Exports and engines know only the network of this project, so they refuse such a folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitnet_lit.checkpoints.config_json import (
    CUSTOM,
    FORMAT_VERSION,
    NETWORK,
    check_config,
    network_in,
    read_raw_config,
)
from bitnet_lit.checkpoints.file_names import CONFIG_NAME, GENERATION_NAME, WEIGHTS_NAME, folder_tokenizer
from bitnet_lit.checkpoints.formats.model_folder import public_info, written_names
from bitnet_lit.config import QuantConfig
from bitnet_lit.config.custom_network import CustomNetwork
from bitnet_lit.config.slots import as_values, custom
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError, one_line
from bitnet_lit.files.atomic import atomic_folder
from bitnet_lit.instantiate import check_allowed
from bitnet_lit.model.custom import build_custom_network


@dataclass
class CustomPretrained:
    """Holds a network of the user's own in memory. `PretrainedModel` explains the attributes."""

    path: Path
    model: nn.Module
    config: CustomNetwork
    quant: QuantConfig
    tokenizer: Tokenizer | None
    info: dict[str, Any]
    tokenizer_sha256: str | None


def save_custom_folder(
    folder: Path,
    config: CustomNetwork,
    quant: QuantConfig,
    tokenizer: Tokenizer | None,
    info: dict[str, Any],
    state: dict[str, Tensor],
) -> None:
    """Write the model folder, replacing an older one in one step; files that the user has put there stay."""
    ends = None if tokenizer is None else tokenizer.end_ids
    described = {
        "model_type": "bitnet_lit",
        "architectures": [config.name],
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.max_position_embeddings,
        "tokenizer_sha256": None if tokenizer is None else tokenizer.sha256,
        "bitnet_lit": {
            "format_version": FORMAT_VERSION,
            "kind": "latent",
            NETWORK: as_values(config),
            "quant": quant.describe(),
            "info": public_info(info),
        },
    }
    with atomic_folder(folder, written_names) as temporary:
        if tokenizer is not None:
            tokenizer.copy_to(temporary)
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        save_file(tensors, temporary / WEIGHTS_NAME, {"format": "pt"})
        (temporary / CONFIG_NAME).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        generation = {"bos_token_id": None if tokenizer is None else tokenizer.bos_id, "eos_token_id": ends}
        (temporary / GENERATION_NAME).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def open_custom_folder(folder: Path, networks: Sequence[str]) -> CustomPretrained | None:
    """Open a folder that holds a network of the user's own; return None where it holds another network.

    Args:
        networks: classes and modules that the user allows to be imported.

    Raises:
        UserError: the user has not named the folder's class, or a file is damaged.
    """
    if not (folder / CONFIG_NAME).is_file():
        return None
    raw = read_raw_config(folder)
    if (target := network_in(raw)) is None:
        return None
    path, ours = folder / CONFIG_NAME, raw["bitnet_lit"]
    check_config(path, raw, CUSTOM)
    check_allowed(ours[NETWORK], networks, str(path), f"checkpoint={folder}", "networks")
    try:
        config, quant = custom(CustomNetwork, ours[NETWORK]), QuantConfig.described(ours["quant"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    network = build_custom_network(config, quant)
    try:
        network.load_state_dict(load_file(folder / WEIGHTS_NAME))
    except (SafetensorError, RuntimeError, OSError) as error:
        text = one_line(error, 300)
        raise UserError(f"{folder / WEIGHTS_NAME}: does not fit {target} ({text}): copy it again") from None
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values() if tensor.is_floating_point()):
        raise UserError(f"{folder / WEIGHTS_NAME}: holds a weight that is not finite: copy it again")
    expected = raw.get("tokenizer_sha256")
    tokenizer = folder_tokenizer(folder)
    if tokenizer is not None and expected not in (None, tokenizer.sha256):
        raise UserError(f"{folder}: its tokenizer is not the one that {CONFIG_NAME} names: copy it again")
    network.eval()
    return CustomPretrained(folder, network, config, quant, tokenizer, ours.get("info", {}), expected)
