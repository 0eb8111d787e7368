"""Evaluation: one deterministic pass over a validation split.

`loss` is in nats per token and depends on the tokenizer; `bits_per_byte` does not: all nats of a text, the end of a
story included, over the bytes of that text. So two models with different vocabularies compare.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_lit.checkpoints.pretrained import from_pretrained
from bitnet_lit.config import EvaluateConfig
from bitnet_lit.data.shards import open_shards
from bitnet_lit.data.token_split import TokenSplit
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import ModelError, UserError
from bitnet_lit.model import CausalLM
from bitnet_lit.plain_yaml import read_yaml


class TextBytes:
    """Bytes of text that target tokens stand for; `tokenizer.text_bytes` on whole batches."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def count(self, ids: Tensor) -> int:
        """Bytes that the targets ids[:, 1:] add to the text; ids int64 (B, T + 1)."""
        array = ids.cpu().numpy()
        return int(self.tokenizer.text_bytes(array[:, :-1], array[:, 1:]))


@dataclass
class LossSums:
    """Sums over targets, from which every figure of an evaluation follows."""

    nats: float = 0.0
    tokens: int = 0
    correct: int = 0
    text_bytes: int = 0

    def add(self, logits: Tensor, ids: Tensor, text_bytes: TextBytes | None) -> None:
        """Count a batch: logits (B, T, V) of ids[:, :-1], ids int64 (B, T + 1)."""
        if not len(ids):
            return
        targets = ids[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        # Summed in float64, so that the result does not depend on how the pass was cut into batches.
        self.nats += float(losses.cpu().double().sum())
        self.tokens += targets.numel()
        self.correct += int((logits.argmax(-1) == targets).sum())
        if text_bytes is not None:
            self.text_bytes += text_bytes.count(ids)

    def as_tensor(self) -> Tensor:
        """(4,) for a reduction over ranks; float64 where the device has it."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    @classmethod
    def from_tensor(cls, sums: Tensor) -> LossSums:
        """The inverse of `as_tensor`."""
        nats, tokens, correct, text_bytes = sums.tolist()
        return cls(nats, int(tokens), int(correct), int(text_bytes))

    def metrics(self) -> dict[str, float]:
        """loss (nats per token), perplexity, accuracy, and bits_per_byte where there is text."""
        loss = self.nats / self.tokens
        metrics = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": self.correct / self.tokens,
        }
        if self.text_bytes:
            metrics["bits_per_byte"] = self.nats / math.log(2) / self.text_bytes
        return metrics


@torch.inference_mode()
def evaluate_split(
    model: CausalLM, split: TokenSplit, batch_size: int, text_bytes: TextBytes | None, device: torch.device
) -> LossSums:
    """Every sequence of `split` once, in order."""
    sums = LossSums()
    for start in range(0, split.num_sequences, batch_size):
        indices = np.arange(start, min(start + batch_size, split.num_sequences))
        ids = torch.from_numpy(split.gather(indices)).to(device)
        sums.add(model(ids[:, :-1]), ids, text_bytes)
    return sums


def _data_of_run(model: Path) -> str | None:
    """The data folder of the run that a model folder lies in; the model folder itself says nothing of this machine."""
    config = model.parent / "config.yaml"
    if not config.is_file():
        return None
    data = read_yaml(config, "give data_dir=<folder of shards>").get("data")
    return data.get("dir") if isinstance(data, dict) and isinstance(data.get("dir"), str) else None


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """What `python -m bitnet_lit.evaluate` does.

    Returns:
        The metrics of `LossSums.metrics` and what they were measured on.

    Raises:
        UserError: no model, no data, or data of another tokenizer.
        ModelError: a loss that is no number.
    """
    folder = from_pretrained(config.checkpoint)
    data_dir = config.data_dir or folder.info.get("data_dir") or _data_of_run(folder.path)
    if data_dir is None:
        raise UserError(f"{folder.path}: does not say what it was trained on: give data_dir=<folder of shards>")
    shards = open_shards(Path(data_dir), folder.tokenizer.path if folder.tokenizer else None)
    if shards.vocab_size > (folder.config.vocab_size or 0):  # some embeddings have rows to spare
        raise UserError(
            f"data_dir={data_dir}: shards of {shards.vocab_size} tokens, but the model knows "
            f"{folder.config.vocab_size}: prepare the text with {folder.path}/tokenizer.model"
        )
    wrote = shards.meta.get("tokenizer_sha256")
    if None not in (wrote, folder.tokenizer_sha256) and wrote != folder.tokenizer_sha256:
        raise UserError(
            f"data_dir={data_dir}: was written with another tokenizer than the one that {folder.path} was trained "
            "with: prepare the text with that one"
        )
    length = config.sequence_length or folder.info.get("sequence_length") or folder.config.max_position_embeddings
    if length > folder.config.max_position_embeddings:
        raise UserError(
            f"sequence_length={length}: is beyond the model's context, {folder.config.max_position_embeddings}: give "
            "that or less"
        )
    split = shards.validation(length)
    device = torch.device(_device(config.accelerator))
    model = folder.model.to(device)
    text_bytes = TextBytes(folder.tokenizer) if folder.tokenizer else None
    sums = evaluate_split(model, split, config.batch_size, text_bytes, device)
    if not math.isfinite(sums.nats):
        raise ModelError(
            f"{folder.path}: its loss is {sums.nats}: weights are finite, what they compute overflows: train it again"
        )
    return {
        **sums.metrics(),
        "tokens": sums.tokens,
        "sequence_length": length,
        "data_dir": str(data_dir),
        "checkpoint": str(folder.path),
    }


def _device(accelerator: str) -> str:
    available = {"cpu": True, "gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if accelerator == "auto":
        accelerator = "gpu" if available["gpu"] else "cpu"
    if not available[accelerator]:
        raise UserError(f"accelerator={accelerator}: not available on this machine: take accelerator=cpu")
    return {"gpu": "cuda"}.get(accelerator, accelerator)
