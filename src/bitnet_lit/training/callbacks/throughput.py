"""The speed of a run is logged as tokens/s, MFU, the share of time spent waiting for data, and peak memory.

MFU (model FLOPs utilization; PaLM, arXiv 2204.02311) is the FLOP/s that the model needs, forward and backward without
recomputation, divided by the peak FLOP/s of the device. For known GPUs the peak is the dense figure of the data sheet.
On other devices a large matrix product is timed once, in the precision of the run.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from bitnet_lit.training.plan import Plan

# Dense bfloat16 FLOP/s without sparsity, from NVIDIA's data sheets (SXM versions).
DATASHEET_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a product of two square matrices, the best of five trials."""
    size = 1024 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a).sum().item()  # .item() waits for the device
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * size**3 / seconds


def peak_flops(device: torch.device, precision: str) -> float:
    """Return the peak FLOP/s of a device, from its data sheet or measured.

    Args:
        precision: the Trainer's precision, such as "32-true" or "bf16-mixed".
    """
    dtype = torch.float32 if precision.startswith("32") else torch.bfloat16
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, flops in DATASHEET_BF16_FLOPS.items():
            if key in name:
                return flops
    return measured_peak_flops(device, dtype)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory since the process started: the device's, or on CPU and MPS the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024


class Throughput(Callback):
    """Logs perf/* at every logging step, measured over the steps since the last one. Validation time is left out."""

    def __init__(self, plan: Plan, precision: str) -> None:
        self.plan, self.precision = plan, precision
        self._peak = 0.0
        self._reset()

    def _reset(self) -> None:
        self._steps, self._seconds, self._data_seconds = 0, 0.0, 0.0
        self._since = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._peak = peak_flops(pl_module.device, self.precision) * trainer.world_size
        self._reset()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seconds += time.perf_counter() - self._since

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._data_seconds += now - self._since  # from the end of the last batch: loading and moving this one
        self._seconds += now - self._since
        self._since = now

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._steps += 1
        logs = self._steps and trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if logs and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # otherwise the clock would stop before the GPU has finished
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        if not logs:
            return
        tokens_per_s = self._steps * self.plan.tokens_per_step / self._seconds
        pl_module.log_dict(
            {
                "perf/tokens_per_s": tokens_per_s,
                "perf/mfu": tokens_per_s * self.plan.accounting.training_flops_per_token / self._peak,
                "perf/data_wait_share": self._data_seconds / self._seconds,
                "perf/peak_memory_gib": peak_memory_bytes(pl_module.device) / 2**30,
            },
            rank_zero_only=True,
        )
        self._reset()
