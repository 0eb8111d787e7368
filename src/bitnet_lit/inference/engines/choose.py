"""Which engine runs a model: the one that the user names, or the fastest that can.

The native engine says what it cannot run (cpu/supported_models.py); PyTorch runs every model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import EngineConfig
from bitnet_lit.errors import UserError
from bitnet_lit.inference.engines import Engine
from bitnet_lit.inference.engines.cpu.cores import allowed_threads
from bitnet_lit.inference.engines.cpu.engine import CpuEngine, NativeModel
from bitnet_lit.inference.engines.cpu.supported_models import why_unsupported
from bitnet_lit.native.build import NoCompilerError

if TYPE_CHECKING:
    from bitnet_lit.model import CausalLM

NATIVE = ("threads", "head", "kv_cache")  # options of the native engine alone


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        UserError: it is not there.
    """
    if device == "cpu":
        return
    import torch

    kind, _, index = device.partition(":")
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= count:
        raise UserError(f"device={device}: not available on this machine: take device=cpu")


def choose_engine(stored: StoredModel, options: EngineConfig, network: Callable[[], CausalLM]) -> Engine:
    """The engine that `options` name; for `auto` the native one where it can run the model, or else PyTorch.

    Warns where `auto` takes PyTorch on a CPU and says why, and where options of the native engine have no effect.

    Args:
        network: gives the model as a PyTorch network on its device; called only if PyTorch runs it.

    Raises:
        UserError: engine=cpu, and the native engine cannot run the model.
    """
    if options.engine == "cpu" or (options.engine == "auto" and options.device == "cpu"):
        reason = why_unsupported(stored.config, stored.quant)
        if reason is None:
            try:
                threads = allowed_threads(options.threads)
                return CpuEngine(NativeModel(stored, options.head, options.kv_cache, threads))
            except NoCompilerError as error:
                reason = str(error)
        if options.engine == "cpu":
            raise UserError(f"engine=cpu: cannot run {stored.path}: {reason}: take engine=torch")
        warnings.warn(f"{stored.path}: PyTorch runs it, slower than the native engine: {reason}", stacklevel=4)
    default = EngineConfig()
    of_native = {key: getattr(options, key) for key in NATIVE if getattr(options, key) != getattr(default, key)}
    if of_native:
        given = ", ".join(f"{key}={value}" for key, value in of_native.items())
        warnings.warn(f"{given}: no effect, because PyTorch runs the model, not the native engine", stacklevel=4)
    from bitnet_lit.inference.engines.torch_engine import TorchEngine

    return TorchEngine(network())
