"""An error of a GPU is reported in one line, and it takes no more with it than it must.

After a fault in a kernel ("unspecified launch failure", "illegal memory access", "device-side assert") CUDA refuses
every later call of the process: the context is lost, and only a new process gets another one. PyTorch's tensors, events
and graphs call CUDA when they are freed, and an error there ends the process (std::terminate, SIGABRT). So what a run
with a lost context holds is kept in memory (`note`), and the process leaves without freeing it (`leave`).

This module does not import torch, because every command imports it before it knows whether it needs torch.
"""

from __future__ import annotations

import os
import re
import sys

from bitnet_lit.errors import is_out_of_memory, names_out_of_memory, one_line
from bitnet_lit.process_end import leave_at_once

_GPU_ERROR = re.compile(r"\b(CUDA|HIP)( driver)? error: |\bcuDNN error: |\bTriton Error \[(CUDA|HIP)\]: ")
# What PyTorch appends to the message of such an error, for developers of kernels.
_BOILERPLATE = re.compile(
    r"\s*(Search for `\w+' in |(CUDA|HIP) kernel errors might be |For debugging consider passing |"
    r"Compile with `TORCH_USE_|Device-side assertion tracking was |Exception raised from ).*",
    re.DOTALL,
)
_kept: list[BaseException] = []  # with their frames, which hold the tensors


def is_gpu_error(error: BaseException) -> bool:
    """Return whether an error comes from the GPU or its driver; too little memory does not count."""
    is_of_torch = any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)
    return (
        isinstance(error, RuntimeError) and (is_of_torch or names_gpu_error(str(error))) and not is_out_of_memory(error)
    )


def names_gpu_error(text: str) -> bool:
    """Return whether a message, such as that of a job in error.txt, is of a GPU's error; too little memory is none."""
    return _GPU_ERROR.search(text) is not None and not names_out_of_memory(text)


def without_boilerplate(message: object) -> str:
    """Return a message on one line, without what PyTorch appends to an error of the GPU."""
    text = str(message)
    return one_line(_BOILERPLATE.sub("", text) if _GPU_ERROR.search(text) else text)


def wants_traceback() -> bool:
    """Return whether the user looks for the place of an error: each kernel is waited for (CUDA_LAUNCH_BLOCKING=1)."""
    return os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0"


def note(error: BaseException) -> None:
    """Remember that this process has lost its GPU, if `error` says so and the GPU does not answer any more."""
    if is_gpu_error(error) and not _answers():
        _kept.append(error)


def is_lost() -> bool:
    """Return whether this process has lost its GPU, so that it cannot train any more."""
    return bool(_kept)


def _answers() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False  # the other ranks do not know: to wait for a collective would take its timeout
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def leave(status: int) -> None:
    """End the process at once if it has lost its GPU: the destructors that run otherwise would abort it."""
    if is_lost():
        leave_at_once(status)
