"""`bitnet_lit.load`: a model as an object that writes.

The native engine needs no torch, whose import takes longer than everything else before the first token; so torch is
imported where it is needed, not here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_lit.checkpoints.locate import find_model, open_stored
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import ModelConfig
from bitnet_lit.config.checks import one_of
from bitnet_lit.data.tokenizers import open_tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.inference import forks  # noqa: F401  # of torch in a child
from bitnet_lit.inference.damage import find_damage
from bitnet_lit.inference.engines import Engine
from bitnet_lit.inference.engines.cpu.build import NoCompilerError
from bitnet_lit.inference.engines.cpu.cores import allowed_threads
from bitnet_lit.inference.engines.cpu.engine import CpuEngine, NativeModel, supports
from bitnet_lit.inference.generator import Generator

SPARE_ROWS = 512  # embeddings are padded to a round number of rows, by less than this or a twentieth

if TYPE_CHECKING:
    from torch import Tensor

    from bitnet_lit.model import CausalLM


class LanguageModel:
    """A trained model.

    Attributes:
        stored: where it came from: path, config, quant, tokenizer.
        engine: what computes the text.
        generator: `generate` and `stream` without the checks below; its `statistics` are of the last text.

    Args:
        engine, threads, head, kv_cache: see `load`.
    """

    def __init__(
        self, stored: StoredModel, device: str, engine: str, threads: int | None, head: str, kv_cache: str
    ) -> None:
        self.stored, self._device = stored, device
        self.engine = self._make_engine(engine, threads, head, kv_cache)
        if stored.tokenizer is not None:
            self.generator = Generator(self.engine, stored.tokenizer, partial(find_damage, stored))

    def _make_engine(self, engine: str, threads: int | None, head: str, kv_cache: str) -> Engine:
        if engine == "torch" or (engine == "auto" and self._device != "cpu"):
            return self._torch_engine()
        reason = supports(self.stored.config, self.stored.quant)
        if reason is None:
            try:
                return CpuEngine(NativeModel(self.stored, head, kv_cache, allowed_threads(threads)))
            except NoCompilerError as error:
                reason = str(error)
                if engine == "auto":
                    print(f"note: {reason}: running on PyTorch, which is slower", file=sys.stderr)
        if engine == "cpu":
            raise UserError(f"engine=cpu: cannot run {self.stored.path}: {reason}: take engine=torch")
        return self._torch_engine()

    def _torch_engine(self) -> Engine:
        from bitnet_lit.inference.engines.torch_engine import TorchEngine

        return TorchEngine(self._network)

    @cached_property
    def _network(self) -> CausalLM:
        from bitnet_lit.checkpoints.pretrained import build_pretrained

        return build_pretrained(self.stored).model.to(self._device)

    @property
    def config(self) -> ModelConfig:
        """The sizes."""
        return self.stored.config

    def _checked(self) -> Generator:
        if self.stored.tokenizer is None:
            raise UserError(
                f"{self.stored.path}: has no tokenizer.model: put the one of its data there, or give tokenizer="
            )
        return self.generator

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """Pieces of the text that goes on from `prompt`; options: see `Generator.stream_batch`."""
        return self._checked().stream(prompt, **options)

    def stream_batch(self, prompts: Sequence[str], **options: Any) -> Iterator[tuple[int, str]]:
        """Pieces of several texts made together, (number of the prompt, piece); see `Generator.stream_batch`."""
        return self._checked().stream_batch(prompts, **options)

    def generate(self, prompt: str, **options: Any) -> str:
        """The whole text, prompt included; options: see `Generator.stream_batch`."""
        return self._checked().generate(prompt, **options)

    def generate_batch(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """Whole texts, prompts included, made together; options: see `Generator.stream_batch`."""
        return self._checked().generate_batch(prompts, **options)

    def logits(self, ids: Tensor) -> Tensor:
        """Logits of every position by the network itself, whatever `engine` is; int64 (B, T) -> float32 (B, T, V).

        Raises:
            UserError: ids of another shape or type, beyond the vocabulary, or more than the context.
        """
        import torch

        vocabulary, context = self.config.vocab_size or 0, self.config.max_position_embeddings
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise UserError(f"ids: must be an int64 tensor (B, T), not {got}")
        if not 0 < ids.shape[1] <= context:
            raise UserError(f"ids: {ids.shape[1]} tokens, where the context holds 1 to {context}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise UserError(f"ids: from {int(ids.min())} to {int(ids.max())}, where the vocabulary has {vocabulary}")
        with torch.inference_mode():
            return self._network(ids.to(self._device)).float().cpu()


def _check_device(device: str) -> None:
    import torch

    kind, _, index = str(device).partition(":")
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(kind, 0)
    if not count or (index and not (index.isdecimal() and int(index) < count)):
        raise UserError(f"device={device}: not available on this machine: take device=cpu")


def load(
    path: str | Path | None = None,
    device: str = "cpu",
    tokenizer: str | Path | None = None,
    engine: str = "auto",
    threads: int | None = None,
    head: str = "auto",
    kv_cache: str = "half",
) -> LanguageModel:
    """Open a model.

    Args:
        path: run folder, model folder, llama2.c's .pt or .bin, or a model of the Hugging Face hub (owner/name); None:
            the newest run below outputs/.
        device: cpu, cuda or mps.
        tokenizer: of a model that comes without one: a SentencePiece model or a tokenizer.json.
        engine: cpu (compiled code), torch, or auto: cpu where it can run the model.
        threads: of the cpu engine; None: one on each physical core.
        head: of the cpu engine: int8, int4, float (exact, slower), or auto: see `InferConfig`.
        kv_cache: of the cpu engine: half (float16), float, or int8 (half the memory of half).

    Raises:
        UserError: no model there, no such device, or an engine that cannot run it.
    """
    one_of("engine", engine, ("auto", "cpu", "torch"))
    one_of("head", head, ("auto", "int8", "int4", "float"))
    one_of("kv_cache", kv_cache, ("half", "float", "int8"))
    if device != "cpu":
        _check_device(device)
    stored = open_stored(find_model(path))
    if tokenizer is not None:
        stored.tokenizer = open_tokenizer(tokenizer)
        stored.check_tokenizer()
        rows, pieces = stored.config.vocab_size or 0, stored.tokenizer.vocab_size
        if rows - pieces >= max(SPARE_ROWS, rows // 20):
            warnings.warn(
                f"tokenizer={tokenizer}: has {pieces} pieces, the model {rows} rows: was it trained with another one?",
                stacklevel=2,
            )
    return LanguageModel(stored, device, engine, threads, head, kv_cache)
