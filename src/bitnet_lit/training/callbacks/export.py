"""A run writes its best model so far to the model folder `model/`.

When the validation loss improves, `model/` is written from best.ckpt. If the last weights of the run are not the best
ones, they go to `model_last/`. Both folders are made only from the checkpoints, so a run that was killed before they
were complete makes them when it is resumed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from bitnet_lit.checkpoints.config_json import CONFIG_NAME
from bitnet_lit.checkpoints.custom_folder import save_custom_folder
from bitnet_lit.checkpoints.formats.model_folder import trained_step, written_names
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import CustomNetwork, TrainConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.model import CausalLM
from bitnet_lit.runs.folder import BEST, CHECKPOINTS, LAST, MODEL, MODEL_LAST
from bitnet_lit.training.callbacks.checkpoints import Checkpoints
from bitnet_lit.training.checkpoint_file import read_checkpoint
from bitnet_lit.training.module import BitNetModule
from bitnet_lit.training.quantization_start import QUANTIZED_SINCE


class ExportModelFolder(Callback):
    """Writes the model folders. It must run after `Checkpoints`, which finds out whether the loss has improved.

    Args:
        tokenizer: is written into the model folder; None where the data has no tokenizer.
        facts: plain data for config.json: the length of a sequence, the seed, and how the model was trained.
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

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep_best(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep_best(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        last = self.run_dir / MODEL_LAST
        if self.checkpoints.best_step != trainer.global_step:
            self._write(pl_module, LAST, last, trainer.global_step)
        elif trained_step(last) is not None:  # from an earlier end, before the run was made longer
            _remove_model(last)

    def _keep_best(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.checkpoints.best_step is not None:
            self._write(pl_module, BEST, self.run_dir / MODEL, self.checkpoints.best_step)

    def _write(self, pl_module: L.LightningModule, checkpoint: str, folder: Path, step: int) -> None:
        """Write the weights of a checkpoint to `folder`, unless it already holds those of `step`."""
        if trained_step(folder) == step:
            return
        assert isinstance(pl_module, BitNetModule)
        content = read_checkpoint(self.run_dir / CHECKPOINTS / checkpoint)
        state = {name.removeprefix("model."): tensor for name, tensor in content["state_dict"].items()}
        saved = content["callbacks"]["Checkpoints"]
        metrics = {name: value for name, value in saved.get("figures", {}).items() if name.startswith("val/")}
        info = {**self.facts, "step": content["global_step"], "metrics": metrics}
        if not saved.get("validated_all", True):
            info["recipe"] = {**info["recipe"], "validated on": saved.get("best_part") or "a part of the split"}
        if content.get(QUANTIZED_SINCE, 0) is None:
            info["warning"] = (
                f"trained in full precision only: these are the weights of step {content['global_step']}, and the run "
                "quantizes later (quant.start_at), so rounding them costs more than it will"
            )
        if isinstance(self.config.model, CustomNetwork):
            save_custom_folder(folder, self.config.model, self.config.quant, self.tokenizer, info, state)
            return
        assert isinstance(pl_module.model, CausalLM)
        save_model_folder(folder, pl_module.model, self.config.quant, self.tokenizer, info, state)


def _remove_model(folder: Path) -> None:
    """Remove the files that were written into a model folder, and the folder itself if it is then empty."""
    names = written_names(folder)
    for name in sorted(names, key=CONFIG_NAME.__eq__):  # config.json goes last: it marks the folder as a model's
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a user's own files stay
        folder.rmdir()
