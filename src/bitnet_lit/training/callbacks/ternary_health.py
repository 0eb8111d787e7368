"""These figures show whether the ternary weights learn: the shares of the codes, the flips, and the weight scales.

Latent weights move at every step, but the quantized weights change only when a latent weight crosses a rounding
threshold and its code flips. In a healthy run many codes flip early, and fewer and fewer towards the end. A matrix with
almost no zeros, or almost only zeros, makes little use of ternary codes. Where rows or groups have their own weight
scales, the mean of the scales is written.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from bitnet_lit.quant import BitLinear
from bitnet_lit.quant.packing import CODES_PER_BYTE, pack_codes, unpack_codes
from bitnet_lit.quant.scheme import Scheme
from bitnet_lit.runs.folder import HEALTH_NAME
from bitnet_lit.training.callbacks.appended import AppendedFile
from bitnet_lit.training.module import BitNetModule
from bitnet_lit.training.sharing import whole

COLUMNS = ("step", "layer", "minus", "zero", "plus", "flip_rate", "weight_scale")


def _pack(codes: Tensor, scheme: Scheme) -> Tensor:
    """Pack int8 codes of any shape into uint8, four codes per byte. Codes that need more than two bits stay int8."""
    if not scheme.is_ternary:
        return codes
    flat = codes.flatten()
    return pack_codes(F.pad(flat, (0, -len(flat) % CODES_PER_BYTE))[:, None]).flatten()


def _unpack(packed: Tensor, like: Tensor) -> Tensor:
    """Undo `_pack`; the codes get the shape and the device of `like`."""
    if packed.dtype == torch.int8:
        return packed.to(like.device)
    return unpack_codes(packed.to(like.device)[:, None]).flatten()[: like.numel()].view(like.shape)


class TernaryHealth(Callback):
    """Logs means over all quantized matrices (ternary/*) and writes a row per matrix to ternary_health.csv.

    Each checkpoint holds the codes of the last validation, so that a resumed run counts the same flips. Ternary codes
    take 2 bits each.
    """

    def __init__(self, run_dir: Path) -> None:
        self.file = AppendedFile(run_dir / HEALTH_NAME)
        self._packed: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, BitNetModule)
        rows: list[tuple[Any, ...]] = []
        for name, layer in pl_module.model.named_modules():
            if not isinstance(layer, BitLinear) or layer.scheme.weights is None:
                continue
            # Under FSDP2 a rank holds some rows, and the codes are those of the whole matrix, so every rank comes here.
            own = {each: whole(getattr(layer, each)) for each in layer.scheme.own_tensors(*layer.weight.shape)}
            rule = layer.scheme.rule_with(own)
            assert rule is not None
            codes, weight_scale = rule.quantize(whole(layer.weight))
            codes = codes.to(torch.int8)
            signs = codes.sign()  # a scheme may have more than three levels: below zero, zero, above zero
            shares = [(signs == sign).float().mean().item() for sign in (-1, 0, 1)]
            previous = self._packed.get(name)
            self._packed[name] = packed = _pack(codes, layer.scheme)
            flip_rate = float("nan")  # at the first validation, and after a checkpoint whose codes have other shapes
            if previous is not None and previous.shape == packed.shape:
                flip_rate = (codes != _unpack(previous, codes)).float().mean().item()
            rows.append((trainer.global_step, name, *shares, flip_rate, weight_scale.mean().item()))
        if not rows:
            return
        means = {column: sum(row[i] for row in rows) / len(rows) for i, column in enumerate(COLUMNS) if i >= 2}
        pl_module.log_dict({f"ternary/{key}": value for key, value in means.items() if value == value})
        if trainer.is_global_zero:
            text = io.StringIO(newline="")
            writer = csv.writer(text)
            if self.file.num_bytes == 0:
                writer.writerow(COLUMNS)
            writer.writerows(rows)
            self.file.append(text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        return {"num_bytes": self.file.num_bytes, "codes": dict(self._packed)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["callbacks"].get("TernaryHealth", {})
        self._packed = state.get("codes", {})
        if trainer.is_global_zero:
            self.file.cut(state.get("num_bytes"))
