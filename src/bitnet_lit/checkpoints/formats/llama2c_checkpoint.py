"""Training checkpoints of llama2.c, stories*.pt, are read here as plain data; nothing in them is executed."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet_lit.checkpoints.formats.llama2c import (
    Llama2cReader,
    file_order,
    llama2c_config,
    their_name,
    tokenizer_beside,
)
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError, one_line


def _check_archive(path: Path) -> None:
    """Refuse an archive whose contents are larger than the file: torch would unpack them into memory.

    Raises:
        ValueError: the archive is compressed or its entries overlap.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries overlap")


def _check_tensor(name: str, tensor: Any) -> None:
    """Refuse anything but a dense tensor on the CPU whose elements all lie in the file.

    Raises:
        ValueError: the value is something else.
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{name} is not a dense tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} is {tuple(tensor.shape)}, but the file holds only a part of it")


def open_pt(path: Path) -> StoredModel:
    """Open a training checkpoint of llama2.c without executing anything in it.

    Raises:
        UserError: the file is damaged, or not such a checkpoint.
    """
    not_one = f"{path}: not a training checkpoint of llama2.c"
    try:
        _check_archive(path)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        arguments, state = checkpoint["model_args"], checkpoint["model"]
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
        for name, tensor in state.items():
            _check_tensor(name, tensor)
        hidden = int(state["layers.0.feed_forward.w1.weight"].shape[0])
        tied = torch.equal(state["output.weight"], state["tok_embeddings.weight"])
        config = llama2c_config(
            path.stem,
            int(arguments["dim"]),
            hidden,
            int(arguments["n_layers"]),
            int(arguments["n_heads"]),
            int(arguments.get("n_kv_heads") or arguments["n_heads"]),
            int(arguments["vocab_size"]),
            int(arguments["max_seq_len"]),
            tied,
        )
        if f"layers.{config.num_hidden_layers - 1}.ffn_norm.weight" not in state:  # before memory is used for them
            raise ValueError(f"it has fewer than {config.num_hidden_layers} layers")
        names = {tensor.name: their_name(tensor) for tensor in file_order(config)}
        shapes = {name: tuple(state[theirs].shape) for name, theirs in names.items()}
    except UserError as error:
        raise UserError(f"{not_one} ({error}): copy it again") from None
    except Exception as error:  # torch raises a different type for each way a file can be broken
        reason = one_line(error, 80)
        raise UserError(f"{not_one} ({type(error).__name__}: {reason}): give stories*.pt or a model folder") from None
    reader = Llama2cReader(config, shapes, lambda name: state[names[name]])
    return StoredModel(path, config, QuantConfig(name="none"), tokenizer_beside(path), {}, reader)
