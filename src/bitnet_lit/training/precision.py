"""The precision of a run: what `trainer.precision=auto` means on this machine, and TF32.

On a GPU with bfloat16 (NVIDIA's since Ampere), `auto` is bf16-mixed: weights, gradients and the optimizer's state stay
float32, and matrix products run in bfloat16 with float32 sums. On CPUs, on Apple's GPUs and on older ones it is
32-true.

Products that stay in float32 then run in TF32 (10 bits of mantissa, float32's exponent), which tensor cores multiply
eight times faster than float32. A precision of 32-true that the user typed means float32 in every product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bitnet_lit.config.trainer import TrainerConfig

AMPERE = (8, 0)  # the first compute capability with bfloat16 and TF32


def uses_cuda(options: TrainerConfig) -> bool:
    """Return whether the run trains on NVIDIA's (or AMD's) GPUs."""
    return options.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def has_device(options: TrainerConfig) -> bool:
    """Return whether this machine has a device of the kind that the run asks for."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return found.get(options.accelerator, options.accelerator != "gpu" or any(found.values()))


def resolved_precision(options: TrainerConfig) -> str:
    """Return the precision of the run on this machine: 32-true, bf16-mixed or bf16-true."""
    if options.precision != "auto":
        return options.precision
    return "bf16-mixed" if uses_cuda(options) and torch.cuda.get_device_capability() >= AMPERE else "32-true"


@contextlib.contextmanager
def tf32(options: TrainerConfig) -> Iterator[None]:
    """Let float32 products use TF32 in the block, unless the user typed 32-true."""
    before = torch.get_float32_matmul_precision()
    if uses_cuda(options) and options.precision != "32-true":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
