"""Jobs that run side by side on one machine (launcher=joblib) share its devices: each gets GPUs of its own.

A process that runs jobs takes a slot: a file in the sweep's folder that it locks until it ends. Slot 0 has the first
GPU, slot 1 the second, and so on; a job on two devices (`trainer.devices=2`) has two. The process sees only its GPUs
(CUDA_VISIBLE_DEVICES), so every job trains on "cuda:0" as it would alone. On a CPU joblib divides the threads.

Processes that share a GPU take turns: a time slice belongs to one of them. Where the daemon of NVIDIA's MPS
(Multi-Process Service) runs, their kernels run at the same time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bitnet_lit.files.locks import lock

SLOTS_NAME = ".slots"
_JOBS_ON_A_CPU = 2
_taken: list[int] = []  # the descriptor whose lock is the slot of this process


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. CUDA is not started."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()][:count]
    return [str(index) for index in range(count)]


def _devices_of_a_job(devices: Any) -> int | None:
    """Return how many GPUs `trainer.devices` asks for; None where it names them or takes all."""
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    return devices if isinstance(devices, int) and devices > 0 else None


def parallel_jobs(accelerator: str, devices: Any) -> int:
    """Return how many jobs to run at once: as many as there are GPUs for, and two on a CPU."""
    gpus = [] if accelerator in ("cpu", "mps") else visible_gpus()
    each = _devices_of_a_job(devices)
    if not gpus:
        return _JOBS_ON_A_CPU
    return 1 if each is None else max(1, len(gpus) // each)


def note_sharing(config: DictConfig) -> None:
    """Print a line where the jobs of a sweep (launcher=joblib) will share a GPU by time slices.

    Args:
        config: of the sweep, with the keys of Hydra.
    """
    at_once = OmegaConf.select(config, "hydra.launcher.n_jobs")
    accelerator, devices = (OmegaConf.select(config, f"trainer.{key}") for key in ("accelerator", "devices"))
    if at_once in (None, 1) or accelerator in ("cpu", "mps") or not (gpus := visible_gpus()):
        return
    places = len(gpus) // (_devices_of_a_job(devices) or len(gpus))
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))  # the daemon's own default
    if not 1 < at_once <= places and not (pipes / "control").exists():  # below 1 is one for each processor
        print(
            "note: jobs share a GPU by time slices, where matrix products can fail (docs/sweeps.md); NVIDIA's MPS runs "
            "them at the same time, without that and faster: nvidia-cuda-mps-control -d",
            file=sys.stderr,
        )


OmegaConf.register_new_resolver("bitnet.parallel_jobs", parallel_jobs, replace=True)


def free_slot(folder: Path) -> tuple[int, int] | None:
    """Lock the first slot that no process has.

    Returns:
        Its number, and the descriptor that holds the lock; None where the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        descriptor = os.open(folder / str(number), os.O_RDWR | os.O_CREAT, 0o666)
        taken = lock(descriptor)
        if taken:
            return number, descriptor
        os.close(descriptor)
        if taken is None:
            return None
        number += 1


def gpus_of_slot(number: int, gpus: Sequence[str], each: int) -> list[str]:
    """Return the GPUs of a slot. Where there are more slots than GPUs, slots share them."""
    return [gpus[(number * each + index) % len(gpus)] for index in range(min(each, len(gpus)))]


def take_gpus(sweep_dir: Path, accelerator: str, devices: Any) -> None:
    """Let this process see the GPUs of a slot of its own, from its first job on. CUDA must not have been started.

    Args:
        sweep_dir: the sweep's folder.
        accelerator, devices: `trainer.accelerator` and `trainer.devices` of the job.
    """
    each = _devices_of_a_job(devices)
    if _taken or each is None or accelerator in ("cpu", "mps") or len(gpus := visible_gpus()) < 2:
        return
    if (slot := free_slot(sweep_dir / SLOTS_NAME)) is not None:
        number, descriptor = slot
        _taken.append(descriptor)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus_of_slot(number, gpus, each))
