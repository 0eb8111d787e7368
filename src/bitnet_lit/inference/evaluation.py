"""`evaluate` measures a trained model in one deterministic pass over a whole validation split, or over text.

On a split it gives the figures that training logs as `val/...` (loss_sums.py), for any model that can be opened and any
data with the model's tokenizer (evaluation_data.py). On text it gives those of evaluation_text.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_lit.checkpoints.custom_folder import open_custom_folder
from bitnet_lit.checkpoints.locate import find_model, open_stored
from bitnet_lit.checkpoints.pretrained import build_pretrained
from bitnet_lit.config import EvaluateConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import ModelError, UserError
from bitnet_lit.inference.evaluation_data import validation_batches
from bitnet_lit.inference.evaluation_text import check_files, evaluate_text, native_scorer
from bitnet_lit.inference.loss_sums import LossSums
from bitnet_lit.inference.scoring import NetworkScorer
from bitnet_lit.model import token_losses


@torch.inference_mode()
def evaluate_batches(
    model: nn.Module, batches: Iterable[Tensor], tokenizer: Tokenizer | None, device: torch.device
) -> LossSums:
    """Run the model on every batch once; batches are int64 (B, T + 1)."""
    sums = LossSums()
    for batch in batches:
        ids = batch.to(device)
        sums.add(*token_losses(model, ids), ids, tokenizer)
    return sums


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a model, as `python -m bitnet_lit.evaluate` does.

    Returns:
        The figures of `LossSums.metrics`, and what they were measured on: `tokens`, `sequence_length`, `data_dir` and
        `checkpoint`. For text, those of `evaluate_text` and `checkpoint`.

    Raises:
        UserError: no model, no data, or data of another tokenizer.
        ModelError: the loss is NaN or infinite.
    """
    check_files(config.data.files)
    path = find_model(config.checkpoint)
    own = open_custom_folder(path, config.networks)
    opened = own or open_stored(path)
    if warning := opened.info.get("warning"):
        warnings.warn(f"{opened.path}: {warning}", stacklevel=2)
    context = opened.config.max_position_embeddings
    length = config.sequence_length or opened.info.get("sequence_length") or context
    if length > context:
        raise UserError(
            f"sequence_length={length}: is beyond the model's context of {context} tokens: give {context} or less"
        )
    device = torch.device(_device(config.accelerator))
    if config.data.files and own is None and device.type == "cpu":
        figures = evaluate_text(config, native_scorer(path), opened.tokenizer, length)
        return {**figures, "checkpoint": str(opened.path)}
    pretrained = own or build_pretrained(open_stored(path))
    model = pretrained.model.to(device)
    if config.data.files:
        figures = evaluate_text(config, NetworkScorer(model, context, config.batch_size), opened.tokenizer, length)
        return {**figures, "checkpoint": str(opened.path)}
    data, batches, tokenizer = validation_batches(pretrained, config, length)
    sums = evaluate_batches(model, batches, tokenizer, device)
    if not sums.tokens:
        raise UserError(f"{data}: its validation split is empty: give data_dir=<folder of shards>")
    if not math.isfinite(sums.nats):
        raise ModelError(
            f"{pretrained.path}: its loss is {sums.nats}: the weights are finite, but what they compute overflows: "
            "train it again"
        )
    return {
        **sums.metrics(),
        "tokens": sums.tokens,
        "sequence_length": length,
        "data_dir": data,
        "checkpoint": str(pretrained.path),
    }


def _device(accelerator: str) -> str:
    """Return PyTorch's name of the device that `accelerator`, Lightning's name, means.

    Raises:
        UserError: this machine does not have it.
    """
    cuda = torch.cuda.is_available()
    if accelerator == "auto":
        accelerator = "gpu" if cuda else "cpu"
    available = {"cpu": True, "gpu": cuda, "cuda": cuda, "mps": torch.backends.mps.is_available()}
    if not available[accelerator]:
        raise UserError(f"accelerator={accelerator}: not available on this machine: take accelerator=cpu")
    return {"gpu": "cuda"}.get(accelerator, accelerator)
