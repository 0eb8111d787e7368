"""`bitnet_lit.load`: a model folder as an object that writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet_lit.artifacts.locate import load_model
from bitnet_lit.artifacts.source import LoadedModel
from bitnet_lit.config import ModelConfig
from bitnet_lit.data.json_tokenizer import open_tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.inference.engines.torch_engine import TorchEngine
from bitnet_lit.inference.generator import Generator


class LanguageModel:
    """A trained model.

    Attributes:
        folder: what was loaded.
        generator: `generate` and `stream` without the checks below; its `statistics` are of the last text.
    """

    def __init__(self, folder: LoadedModel, device: torch.device) -> None:
        self.folder = folder
        self._engine = TorchEngine(folder.model.to(device))
        if folder.tokenizer is not None:
            self.generator = Generator(self._engine, folder.tokenizer)

    @property
    def config(self) -> ModelConfig:
        """The sizes."""
        return self.folder.config

    def _checked(self) -> Generator:
        if self.folder.tokenizer is None:
            raise UserError(
                f"{self.folder.path}: has no tokenizer.model: put the one of its data there, or give tokenizer="
            )
        return self.generator

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """Pieces of the text that goes on from `prompt`; options: see `Generator.stream`."""
        return self._checked().stream(prompt, **options)

    def generate(self, prompt: str, **options: Any) -> str:
        """The whole text, prompt included; options: see `Generator.stream`."""
        return self._checked().generate(prompt, **options)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits of every position; ids int64 (B, T) -> float32 (B, T, V) on the CPU."""
        return self._engine.model(ids.to(self._engine.device)).float().cpu()


def load(path: str | Path | None = None, device: str = "cpu", tokenizer: str | Path | None = None) -> LanguageModel:
    """Open a model.

    Args:
        path: run folder, model folder, llama2.c's .pt or .bin, or a model of the Hugging Face hub (owner/name); None:
            the newest run below outputs/.
        device: cpu, cuda or mps.
        tokenizer: of a model that comes without one: a SentencePiece model or a tokenizer.json.

    Raises:
        UserError: no model there, or no such device.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.split(":")[0], False):
        raise UserError(f"device={device}: not available on this machine: take device=cpu")
    model = load_model(path)
    if tokenizer is not None:
        model.tokenizer = open_tokenizer(tokenizer)
    return LanguageModel(model, torch.device(device))
