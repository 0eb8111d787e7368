"""Stories while a run goes on: what the loss looks like as text."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from rich.console import Console

from bitnet_lit.data.tokenizer import Tokenizer
from bitnet_lit.inference.engines.torch_engine import TorchEngine
from bitnet_lit.inference.generator import Generator
from bitnet_lit.training.module import BitNetModule

SAMPLES_NAME = "samples.txt"


class SampleStories(Callback):
    """Goes on from each prompt at every validation, greedily, so that two moments compare; appends to samples.txt."""

    def __init__(self, run_dir: Path, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int) -> None:
        self.path = run_dir / SAMPLES_NAME
        self.tokenizer, self.prompts, self.max_new_tokens = tokenizer, prompts, max_new_tokens

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, BitNetModule)
        generator = Generator(TorchEngine(pl_module.model, pack=False), self.tokenizer)
        stories = [
            generator.generate(prompt, max_new_tokens=self.max_new_tokens, temperature=0.0) for prompt in self.prompts
        ]
        with self.path.open("a", encoding="utf-8") as file:
            for story in stories:
                file.write(f"--- step {trainer.global_step}\n{story}\n\n")
        Console(stderr=True).print(f"[dim]step {trainer.global_step}:[/dim] {stories[0]}", highlight=False, markup=True)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", "\n\n".join(stories), trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_text("samples", columns=["story"], data=[[story] for story in stories])
