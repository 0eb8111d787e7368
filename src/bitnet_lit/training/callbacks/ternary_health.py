"""Do the ternary weights learn? Shares of the codes, flips between validations, scales.

Latent weights move all the time; what the network computes with changes only when one crosses a rounding border and
its code flips. A healthy run flips much early and less and less towards the end; a matrix with nearly no zeros, or
nearly only zeros, has lost what the third value is for. Where rows or groups have scales of their own, their mean is
noted.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from bitnet_lit.quant import BitLinear
from bitnet_lit.quant.packing import CODES_PER_BYTE, pack_codes, unpack_codes
from bitnet_lit.quant.scheme import Scheme
from bitnet_lit.runs.folder import HEALTH_NAME
from bitnet_lit.training.callbacks.appended import AppendedFile
from bitnet_lit.training.module import BitNetModule

COLUMNS = ("step", "layer", "minus", "zero", "plus", "flip_rate", "weight_scale")


def _pack(codes: Tensor, scheme: Scheme) -> Tensor:
    """int8 codes of any shape -> uint8, four a byte; those that two bits do not hold stay as they are."""
    if not scheme.is_ternary:
        return codes
    flat = codes.flatten()
    return pack_codes(F.pad(flat, (0, -len(flat) % CODES_PER_BYTE))[:, None]).flatten()


def _unpack(packed: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_pack`, in the shape and on the device of `like`."""
    if packed.dtype == torch.int8:
        return packed.to(like.device)
    return unpack_codes(packed.to(like.device)[:, None]).flatten()[: like.numel()].view(like.shape)


def _quantized_layers(trained: nn.Module | None, model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """Every quantized layer of `model` and its name, each with its whole matrix as long as it is the current one.

    FSDP leaves each rank a part of each matrix, as a flat vector. Here the matrices of one FSDP module (a decoder
    layer) are put together at a time, on every rank; so all ranks must take all layers.

    Args:
        trained: what the strategy trains: the LightningModule, or a wrapper around it.
    """
    layers: dict[BitLinear, str] = {
        layer: name.replace("_fsdp_wrapped_module.", "")
        for name, layer in model.named_modules()
        if isinstance(layer, BitLinear)
    }
    units = [] if trained is None else FullyShardedDataParallel.fsdp_modules(trained)
    for unit in units:
        inside = {module for other in FullyShardedDataParallel.fsdp_modules(unit)[1:] for module in other.modules()}
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            for layer in unit.modules():
                if isinstance(layer, BitLinear) and layer in layers and layer not in inside:
                    yield layers[layer], layer
    if not units:
        for layer, name in layers.items():
            yield name, layer


class TernaryHealth(Callback):
    """Logs means over all quantized matrices (ternary/*) and writes a row per matrix to ternary_health.csv.

    The codes of the last validation go into each checkpoint, 2 bits each where they fit, so that a resumed run counts
    the same flips.
    """

    def __init__(self, run_dir: Path) -> None:
        self.file = AppendedFile(run_dir / HEALTH_NAME)
        self._packed: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, BitNetModule)
        rows: list[tuple[Any, ...]] = []
        for name, layer in _quantized_layers(trainer.strategy.model, pl_module.model):
            codes, weight_scale = layer.quantized_weight()
            codes = codes.to(torch.int8)
            signs = codes.sign()  # of schemes with more levels: below zero, zero, above zero
            shares = [(signs == sign).float().mean().item() for sign in (-1, 0, 1)]
            previous = self._packed.get(name)
            self._packed[name] = packed = _pack(codes, layer.scheme)
            flip_rate = float("nan")  # at the first validation, or behind a checkpoint of a version that took parts
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
