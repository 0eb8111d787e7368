"""A run writes sample texts at each validation, so that its progress can be read as text beside the loss.

On a CPU the native engine generates them where it has been compiled before (`infer` does it): a hundred tokens of the
demo model take it 10 ms, and PyTorch, which rounds the weights again for each token, half a second. Both choose the
same tokens, unless two logits are equal up to float32's rounding.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from rich.text import Text

from bitnet_lit.checkpoints.from_network import from_network
from bitnet_lit.config import GenerationConfig, QuantConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.inference.engines import Engine
from bitnet_lit.inference.engines.cpu.cores import physical_cores
from bitnet_lit.inference.engines.cpu.engine import CpuEngine, NativeModel
from bitnet_lit.inference.engines.cpu.native import ENGINE
from bitnet_lit.inference.engines.cpu.supported_models import why_unsupported
from bitnet_lit.inference.engines.torch_engine import TorchEngine
from bitnet_lit.inference.generator import Generator
from bitnet_lit.model import CausalLM
from bitnet_lit.native.build import NoCompilerError, is_kept
from bitnet_lit.runs.folder import SAMPLES_NAME
from bitnet_lit.terminal import console
from bitnet_lit.training.callbacks.appended import AppendedFile
from bitnet_lit.training.compile import not_compiled
from bitnet_lit.training.module import BitNetModule
from bitnet_lit.training.strategies import is_sharded, whole_copy


class SampleStories(Callback):
    """Continues each prompt at every validation, and appends the texts to samples.txt.

    Tokens are chosen greedily, so texts of different steps differ only by the weights.
    """

    def __init__(self, run_dir: Path, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int) -> None:
        self.file = AppendedFile(run_dir / SAMPLES_NAME)
        self.tokenizer, self.prompts = tokenizer, prompts
        self.options = GenerationConfig(max_new_tokens=max_new_tokens, temperature=0.0)
        self._native_is_kept: bool | None = None

    def _engine(self, model: CausalLM, quant: QuantConfig) -> Engine:
        """Return the fastest engine that need not be compiled first."""
        if model.model.embed_tokens.weight.device.type == "cpu" and why_unsupported(model.config, quant) is None:
            if self._native_is_kept is None:
                self._native_is_kept = is_kept(ENGINE)
            if self._native_is_kept:
                threads = min(physical_cores(), torch.get_num_threads())
                with contextlib.suppress(NoCompilerError, UserError):  # it cannot be loaded, or sizes are too large
                    stored = from_network(model, quant, self.file.path)
                    return CpuEngine(NativeModel(stored, head="float", kv_cache="float", threads=threads))
        return TorchEngine(model, pack=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.callback_metrics["val/loss"].isfinite():
            return  # a model with a loss that is not finite generates nothing useful; `Checkpoints` ends the run
        assert isinstance(pl_module, BitNetModule)
        model: torch.nn.Module | None = pl_module.model
        if is_sharded(pl_module.model):
            model = whole_copy(pl_module, trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        assert isinstance(model, CausalLM)  # other networks have no key-value cache to generate with
        generator = Generator(self._engine(model, pl_module.config.quant), self.tokenizer)
        with not_compiled():
            stories = generator.generate_batch(self.prompts, self.options)
        self.file.append("".join(f"--- step {trainer.global_step}\n{story}\n\n" for story in stories))
        line = Text.assemble((f"step {trainer.global_step}: ", "dim"), stories[0])
        console(stderr=True).print(line)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", "\n\n".join(stories), trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_text("samples", columns=["story"], data=[[story] for story in stories])

    def state_dict(self) -> dict[str, Any]:
        return {"num_bytes": self.file.num_bytes}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            self.file.cut(checkpoint["callbacks"].get("SampleStories", {}).get("num_bytes"))
