"""This module has what every kernel here needs: its operator, the device, the multiprocessors, and block sizes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

_LIBRARY = torch.library.Library("bitnet_lit", "FRAGMENT")
_UNCHANGED = nullcontext()


def operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an operator of PyTorch, `torch.ops.bitnet_lit.<name>`, which `torch.compile` does not look into.

    `torch.library.custom_op` does the same, but its checks take longer than the launch of a kernel: a call took 45 us
    with it and 18 us with this (a function that makes two tensors; CPU, torch 2.13). A step has hundreds of calls.

    Args:
        fake: returns empty tensors of the shapes and dtypes of the results.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__
        schema = name + torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        for device in ("CUDA", "CPU"):  # Triton's interpreter runs on CPU tensors
            _LIBRARY.impl(name, function, device)
        torch.library.register_fake(f"bitnet_lit::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.bitnet_lit, name).default

    return register


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors (SMs) of a GPU, and a small number for a CPU (Triton's interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch kernels on the device of `tensor`, whichever is the current one."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _UNCHANGED


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
