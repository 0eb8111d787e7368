"""Do the ternary weights learn? Shares of the codes, flips between validations, scales.

Latent weights move all the time; what the network computes with changes only when one crosses a rounding border and
its code flips. A healthy run flips much early and less and less towards the end; a matrix with nearly no zeros, or
nearly only zeros, has lost what the third value is for.
"""

from __future__ import annotations

import csv
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from bitnet_lit.quant import BitLinear
from bitnet_lit.quant.functional import quantize_weight
from bitnet_lit.training.module import BitNetModule

HEALTH_NAME = "ternary_health.csv"
COLUMNS = ("step", "layer", "minus", "zero", "plus", "flip_rate", "weight_scale")


class TernaryHealth(Callback):
    """Logs means over all quantized matrices (ternary/*) and writes a row per matrix to ternary_health.csv."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / HEALTH_NAME
        self._codes: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, BitNetModule)
        rows = []
        for name, layer in pl_module.model.named_modules():
            if not isinstance(layer, BitLinear):
                continue
            codes, weight_scale = quantize_weight(layer.weight, layer.quant)
            codes = codes.to(torch.int8)
            shares = [(codes == code).float().mean().item() for code in (-1, 0, 1)]
            previous = self._codes.get(name)
            # Unknown at the first validation, and at the first one after a resume.
            flip_rate = float("nan") if previous is None else (codes != previous).float().mean().item()
            self._codes[name] = codes
            rows.append((trainer.global_step, name, *shares, flip_rate, weight_scale.item()))
        if not rows:
            return
        means = {column: sum(row[i] for row in rows) / len(rows) for i, column in enumerate(COLUMNS) if i >= 2}
        pl_module.log_dict({f"ternary/{key}": value for key, value in means.items() if value == value})
        if trainer.is_global_zero:
            is_new = not self.path.exists()
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if is_new:
                    writer.writerow(COLUMNS)
                writer.writerows(rows)
