"""What every launch of a Triton kernel here needs: the device, its number of multiprocessors, and block sizes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
from torch import Tensor


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors (SMs) of a GPU, and a small number for a CPU (Triton's interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch kernels on the device of `tensor`, whichever is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def power_of_2(number: float) -> int:
    """Return the largest power of two that is at most `number`, and at least 1."""
    return 1 << (max(1, int(number)).bit_length() - 1)


def column_blocks(columns: int) -> tuple[int, int]:
    """Return the widths of two blocks that hold a row: the largest power of two in it, and one for the rest, maybe 0.

    Blocks of Triton have sizes that are powers of two. A single one for 5632 columns would have 8192, of which a third
    would be computed for nothing; these two have 4096 and 2048.
    """
    first = power_of_2(columns)
    return first, triton.next_power_of_2(columns - first) if columns > first else 0
