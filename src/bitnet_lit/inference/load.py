"""`bitnet_lit.load`: a model as an object that writes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet_lit.artifacts import source as sources
from bitnet_lit.artifacts.locate import find_model, open_source
from bitnet_lit.artifacts.source import Source
from bitnet_lit.config import ModelConfig
from bitnet_lit.data.json_tokenizer import open_tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.inference.engines import Engine
from bitnet_lit.inference.engines.cpu.build import NoCompilerError
from bitnet_lit.inference.engines.cpu.engine import CpuEngine, NativeModel, supports
from bitnet_lit.inference.engines.torch_engine import TorchEngine
from bitnet_lit.inference.generator import Generator
from bitnet_lit.model import CausalLM


class LanguageModel:
    """A trained model.

    Attributes:
        source: where it came from: path, config, quant, tokenizer.
        engine: what computes the text.
        generator: `generate` and `stream` without the checks below; its `statistics` are of the last text.

    Args:
        engine, threads, head: see `load`.
    """

    def __init__(self, source: Source, device: torch.device, engine: str, threads: int | None, head: str) -> None:
        self.source, self._device = source, device
        self.engine = self._make_engine(engine, threads, head)
        if source.tokenizer is not None:
            self.generator = Generator(self.engine, source.tokenizer)

    def _make_engine(self, engine: str, threads: int | None, head: str) -> Engine:
        if engine == "torch" or (engine == "auto" and self._device.type != "cpu"):
            return TorchEngine(self._network)
        reason = supports(self.source.config, self.source.quant)
        if reason is None:
            try:
                return CpuEngine(NativeModel(self.source, head, threads))
            except NoCompilerError as error:
                reason = str(error)
                if engine == "auto":
                    print(f"note: {reason}: running on PyTorch, which is slower", file=sys.stderr)
        if engine == "cpu":
            raise UserError(f"engine=cpu: cannot run {self.source.path}: {reason}: take engine=torch")
        return TorchEngine(self._network)

    @cached_property
    def _network(self) -> CausalLM:
        return sources.load(self.source).model.to(self._device)

    @property
    def config(self) -> ModelConfig:
        """The sizes."""
        return self.source.config

    def _checked(self) -> Generator:
        if self.source.tokenizer is None:
            raise UserError(
                f"{self.source.path}: has no tokenizer.model: put the one of its data there, or give tokenizer="
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
        """Logits of every position by the network itself, whatever `engine` is; int64 (B, T) -> float32 (B, T, V)."""
        return self._network(ids.to(self._device)).float().cpu()


def load(
    path: str | Path | None = None,
    device: str = "cpu",
    tokenizer: str | Path | None = None,
    engine: str = "auto",
    threads: int | None = None,
    head: str = "int8",
) -> LanguageModel:
    """Open a model.

    Args:
        path: run folder, model folder, llama2.c's .pt or .bin, or a model of the Hugging Face hub (owner/name); None:
            the newest run below outputs/.
        device: cpu, cuda or mps.
        tokenizer: of a model that comes without one: a SentencePiece model or a tokenizer.json.
        engine: cpu (compiled code), torch, or auto: cpu where it can run the model.
        threads: of the cpu engine; None: one on each physical core.
        head: of the cpu engine: int8 or float (exact, slower).

    Raises:
        UserError: no model there, no such device, or an engine that cannot run it.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.split(":")[0], False):
        raise UserError(f"device={device}: not available on this machine: take device=cpu")
    source = open_source(find_model(path))
    if tokenizer is not None:
        source.tokenizer = open_tokenizer(tokenizer)
    return LanguageModel(source, torch.device(device), engine, threads, head)
