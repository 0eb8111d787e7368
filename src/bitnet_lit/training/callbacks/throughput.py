"""The speed of a run is logged as tokens/s, MFU, the share of time spent waiting for data, and peak memory.

MFU (model FLOPs utilization; PaLM, arXiv 2204.02311) is the FLOP/s that the model needs, forward and backward without
recomputation, divided by the peak FLOP/s of the device. A teacher's forward pass is not counted. For known GPUs the
peak is the dense figure of the data sheet. On other devices a large matrix product is timed once, in the precision of
the run, and in that of the kernels that compute it. On a CPU with AMX these multiply in bfloat16, several times as fast
as in float32.

Peak memory is what PyTorch has allocated on a GPU. On a CPU it is the resident size of the process, with the
about 0.4 GiB of Python and PyTorch themselves, which the plan's estimate leaves out.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from bitnet_lit.quant.kernels.choose import computing
from bitnet_lit.training.compile import is_compiled
from bitnet_lit.training.figures import Figure, Moment
from bitnet_lit.training.module import BitNetModule
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


def peak_flops(device: torch.device, precision: str, network: nn.Module | None = None) -> float:
    """Return the peak FLOP/s of a device, from its data sheet or measured.

    Args:
        precision: the Trainer's precision, such as "32-true" or "bf16-mixed".
        network: what is trained there. Its kernels may multiply in a faster dtype than that of the precision.
    """
    dtype = torch.float32 if precision.startswith("32") else torch.bfloat16
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, flops in DATASHEET_BF16_FLOPS.items():
            if key in name:
                return flops
    kernels = None if network is None else computing(network, device, dtype, is_compiled(network))
    dtypes = {dtype, dtype if kernels is None else kernels.multiplied_dtype(dtype)}
    return max(measured_peak_flops(device, each) for each in dtypes)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory since the process started: the device's, or on CPU and MPS the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024


class Throughput(Callback):
    """Measures perf/* at every logging step, over the steps since the last one. Validation time is left out.

    On a GPU the times are those at which the GPU has done the steps, and the host does not wait for them.
    """

    def __init__(self, plan: Plan, precision: str) -> None:
        self.plan, self.precision = plan, precision
        self._peak = 0.0
        self._steps, self._data_seconds, self._waiting_since = 0, 0.0, 0.0
        self._spans: list[tuple[Moment, Moment]] = []

    def _start(self, device: torch.device) -> None:
        self._since, self._waiting_since = Moment(device), time.perf_counter()

    def _end_span(self, device: torch.device) -> None:
        self._spans.append((self._since, Moment(device)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, BitNetModule)
        self._peak = peak_flops(pl_module.device, self.precision, pl_module.model) * trainer.world_size
        self._start(pl_module.device)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_span(pl_module.device)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._data_seconds += time.perf_counter() - self._waiting_since  # since the end of the last batch

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, BitNetModule)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._steps += 1
            if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                self._end_span(pl_module.device)
                pl_module.step_figures |= self._figures(pl_module.device)
                self._steps, self._data_seconds, self._spans = 0, 0.0, []
                self._since = Moment(pl_module.device)
        self._waiting_since = time.perf_counter()

    def _figures(self, device: torch.device) -> dict[str, Figure]:
        tokens, waited, spans = self._steps * self.plan.tokens_per_step, self._data_seconds, self._spans
        flops_per_token = self.plan.accounting.training_flops_per_token

        def seconds() -> float:
            return sum(end.seconds_since(start) for start, end in spans)

        return {
            "perf/tokens_per_s": lambda: tokens / seconds(),
            "perf/mfu": lambda: tokens / seconds() * flops_per_token / self._peak,
            "perf/data_wait_share": lambda: waited / seconds(),
            "perf/peak_memory_gib": peak_memory_bytes(device) / 2**30,
        }
