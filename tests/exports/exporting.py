"""Models to export, and exporting them in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import ExportConfig, QuantConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.exports import compare
from bitnet_lit.exports.write import export
from bitnet_lit.model import CausalLM, build_model
from tests.support import tiny_config

QUANTS = {
    "b158": QuantConfig(),
    "absmedian": QuantConfig(weight_scale="absmedian"),
    "b1": QuantConfig(name="b1"),
    "none": QuantConfig(name="none"),
}
GGUFS = {
    f"{type}+{embeddings}": {"format": "gguf", "type": type, "embeddings": embeddings}
    for type in ("tq2_0", "tq1_0", "f16")
    for embeddings in ("q8_0", "q6_k", "f16")
}
FORMATS: dict[str, dict[str, str]] = {
    "latent": {"format": "latent"},
    "latent_bf16": {"format": "latent", "dtype": "bfloat16"},
    "packed": {"format": "packed"},
    "packed_bf16": {"format": "packed", "dtype": "bfloat16"},
    "llama2c": {"format": "llama2c"},
    **GGUFS,
}


def random_model(quant: QuantConfig, seed: int = 0, **sizes: Any) -> CausalLM:
    """A random model whose rows fill ternary blocks; norms are random too, so that mixing them up shows.

    Its logits have a spread of about 1 as a trained model's have: what a rounding may change is said relative to it.
    """
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "initializer_range": 0.06,
    }
    model = build_model(tiny_config(**{**defaults, **sizes}), quant).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith((".bias", "_scale")) or ".value_embed." in name:
                parameter.normal_(std=0.1)
            elif name.endswith(".scale_gain"):
                parameter.uniform_(0.5, 2)
    return model


def saved_model(folder: Path, quant: QuantConfig, tokenizer: Tokenizer | None, seed: int = 0, **sizes: Any) -> Path:
    """The folder of a random model."""
    save_model_folder(folder, random_model(quant, seed, **sizes), quant, tokenizer, {"step": 7})
    return folder


def export_to(out: Path, checkpoint: Path, **options: Any) -> dict[str, Any]:
    """`python -m bitnet_lit.export checkpoint=... out=...`; out may be left to the default with None."""
    return export(ExportConfig(checkpoint=str(checkpoint), out=None if out is None else str(out), **options))


def files_below(folder: Path) -> dict[str, bytes]:
    """Everything on the disk, hidden and temporary files included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def leave_out_other_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare by our own reading alone: transformers and llama.cpp take seconds."""
    monkeypatch.setattr(compare, "_run_tool", lambda *_: "left out")
