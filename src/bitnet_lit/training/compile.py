"""`torch.compile` for a run: which parts are compiled, where the result is kept, and what happens where it fails.

A network of this package is compiled layer by layer. Layers of one kind run the same code, so it is compiled once:
that takes seconds, where the whole network takes half a minute and more, and the steps are as fast. The parts of the
loss are compiled too, so that a softmax reads its logits once. A network of the user's own is compiled as a whole.

Compiled kernels are kept in $TORCHINDUCTOR_CACHE_DIR; by default in the folder torchinductor beside the native engine's
cache (~/.cache/bitnet_lit), where later runs find them. Where that cannot be written they go to PyTorch's default, a
folder in /tmp.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from bitnet_lit.config import TrainConfig
from bitnet_lit.errors import one_line
from bitnet_lit.model import CausalLM
from bitnet_lit.native.build import writable_cache_folder
from bitnet_lit.terminal import console

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Return whether the run is compiled."""
    return config.compile == "true" or (config.compile == "auto" and device.type == "cuda")


def compile_networks(*networks: nn.Module) -> None:
    """Compile the networks of a run in place, at their first call; the names of their parameters stay.

    What was compiled for other networks in this process is forgotten. PyTorch keeps a number of variants of a function,
    and runs further ones without compiling them; the jobs of a sweep would come to more.
    """
    import torch._dynamo  # takes seconds
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # PyTorch compiles eight variants of a function and runs further ones uncompiled. There is one for each kind of
    # layer (with value embeddings, the first one), each phase of quantization, and each size of batches.
    torch._dynamo.config.recompile_limit = 64
    torch.compiler.reset()
    # PyTorch writes its own default, a folder in /tmp, there when Lightning imports it.
    is_named = os.environ.get(CACHE) not in (None, os.path.abspath(default_cache_dir()))
    if not is_named and (folder := writable_cache_folder("torchinductor")):
        os.environ[CACHE] = str(folder)
    for model in networks:
        if not isinstance(model, CausalLM):
            model.compile()
            continue
        for part in (*model.model.layers, model.model.norm, model.softmax_gradient, model.token_losses):
            part.compile(dynamic=False)  # a training batch always has one shape


def undo_compile(model: nn.Module) -> None:
    """Let a network run as it was before `compile_networks`."""
    for module in model.modules():
        module._compiled_call_impl = None


def is_compiled(model: nn.Module) -> bool:
    """Return whether a network, or a part of it, is compiled."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def compile_failure(error: Exception) -> str | None:
    """Return what the compiler could not do, in one line, or None where the error has another cause."""
    home = type(error).__module__
    return one_line(error, 300) if home.startswith(("torch._dynamo", "torch._inductor", "triton")) else None


@contextlib.contextmanager
def not_compiled() -> Iterator[None]:
    """Run compiled networks as plain PyTorch in the block: one that generates text has another shape at every token."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds, and nothing was compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class CompileTime(Callback):
    """Prints how long the first optimizer step took, which compiles the network."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._is_done = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_done or self._since is None or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._is_done = True
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        if trainer.is_global_zero and is_compiled(pl_module):
            seconds, where = time.perf_counter() - self._since, os.environ.get(CACHE)
            kept = "" if where is None else f" (kept in {where})"
            console(stderr=True).print(f"compiled in {seconds:.0f} s, with the first step{kept}")
