"""This module asks a GPU whether it can start kernels early, how many programs it runs, and what memory they have."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton


@cache
def early(device: torch.device) -> dict[str, Any]:
    """Return the launch options of a kernel that may start before the one before it ends (kernels/__init__.py).

    Hopper is the first GPU that can do so.
    """
    can = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if can else {"PDL": False}


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs surely run at the same time: one on each multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def loads_ahead(device: torch.device) -> int:
    """Return how many blocks a product loads ahead: the `num_stages` of a kernel.

    GPUs of data centers have 160 KiB of shared memory or more for a program, others 99 KiB.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    memory = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return 3 if memory >= 128 * 2**10 else 2
