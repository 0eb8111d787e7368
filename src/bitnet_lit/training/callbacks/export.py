"""The model folder of a run: always the best model so far.

At each improvement of the validation loss `model/` is replaced by the weights of that moment. When the run ends with
other than its best weights, those of the end go to `model_last/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from bitnet_lit.artifacts.save import save_model_folder
from bitnet_lit.config import TrainConfig
from bitnet_lit.data.tokenizer import Tokenizer
from bitnet_lit.training.callbacks.checkpoints import Checkpoints
from bitnet_lit.training.module import BitNetModule

MODEL, MODEL_LAST = "model", "model_last"


class ExportModelFolder(Callback):
    """Writes the model folder; runs after `Checkpoints`, which knows what an improvement is.

    Args:
        facts: plain data for config.json (where the data lies, the length of a sequence).
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrainConfig,
        tokenizer: Tokenizer | None,
        facts: dict[str, Any],
        checkpoints: Checkpoints,
    ) -> None:
        self.run_dir, self.config, self.tokenizer = run_dir, config, tokenizer
        self.facts, self.checkpoints = facts, checkpoints

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.checkpoints.improved:
            self._write(trainer, pl_module, self.run_dir / MODEL)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.checkpoints.improved:
            self._write(trainer, pl_module, self.run_dir / MODEL_LAST)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> None:
        """Save the weights of this moment; every rank calls it."""
        state = trainer.strategy.lightning_module_state_dict()  # gathers the shards of FSDP
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, BitNetModule)
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        info = {**self.facts, "step": trainer.global_step, "metrics": metrics}
        save_model_folder(folder, pl_module.model, self.config.quant, self.tokenizer, info, state)
