"""A run can be profiled (mode=profile): PyTorch's profiler writes a Chrome trace and a table of the slowest operations.

The trace shows every operation on a time line. The table sums the time of each kind of operation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, schedule


class Profile(Callback):
    """Traces optimizer steps of rank 0, and writes profile/trace.json and profile/table.txt.

    Args:
        steps: how many are traced, after the first three.
    """

    def __init__(self, run_dir: Path, steps: int) -> None:
        self.folder = run_dir / "profile"
        self.steps = steps
        self._profiler: profile | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        activities = [ProfilerActivity.CPU]
        sort_by = "self_cpu_time_total"
        if pl_module.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            sort_by = "self_cuda_time_total"

        def write(profiler: profile) -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / "trace.json"))
            table = profiler.key_averages().table(sort_by=sort_by, row_limit=20)
            (self.folder / "table.txt").write_text(table, encoding="utf-8")
            print(table)
            print(f"open {self.folder / 'trace.json'} in chrome://tracing or ui.perfetto.dev")

        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=1, warmup=2, active=self.steps, repeat=1),
            on_trace_ready=write,
            record_shapes=True,
            profile_memory=True,
        )
        self._profiler.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is not None and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._profiler.step()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
