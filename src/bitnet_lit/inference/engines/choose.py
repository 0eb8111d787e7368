"""Which engine runs a model: the one that the user names, or the fastest that can.

The native engine and the CUDA engine say what they cannot run (their supported_models.py); PyTorch runs every model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import EngineConfig
from bitnet_lit.config.checks import written
from bitnet_lit.config.inference import CUDA_HEADS, CUDA_KV_CACHES
from bitnet_lit.errors import UserError
from bitnet_lit.inference.engines import Engine
from bitnet_lit.inference.engines.cpu.cores import allowed_threads
from bitnet_lit.inference.engines.cpu.engine import CpuEngine, NativeModel
from bitnet_lit.inference.engines.cpu.supported_models import why_unsupported
from bitnet_lit.inference.engines.cuda import supported_models
from bitnet_lit.inference.engines.cuda.supported_models import NoKernelsError
from bitnet_lit.native.build import NoCompilerError

if TYPE_CHECKING:
    from bitnet_lit.model import CausalLM


def check_device(device: str, engine: str = "auto") -> None:
    """Refuse a device that this machine does not have.

    Args:
        engine: `EngineConfig.engine`, which may be what the user typed in place of the device.

    Raises:
        UserError: it is not there.
    """
    if device == "cpu":
        return
    import torch

    kind, _, index = device.partition(":")
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= count:
        if engine == "cuda" and count == 0:
            raise UserError("engine=cuda: no NVIDIA GPU is available on this machine: take engine=auto")
        raise UserError(f"device={device}: not available on this machine: take device=cpu")


def choose_engine(stored: StoredModel, options: EngineConfig, network: Callable[[], CausalLM]) -> Engine:
    """Return the engine that `options` name; for `auto` the fastest of the device that can run the model.

    Warns where `auto` takes PyTorch and says why, and where options have no effect.

    Args:
        network: gives the model as a PyTorch network on its device; called only if PyTorch runs it.

    Raises:
        UserError: an engine is named that cannot run the model.
    """
    kind = options.device.partition(":")[0] if options.engine == "auto" else options.engine
    engine = {"cpu": _native_engine, "cuda": _cuda_engine}.get(kind, _no_engine)(stored, options)
    if not isinstance(engine, str):
        return engine
    if engine and options.engine != "auto":
        raise UserError(f"engine={kind}: cannot run {stored.path}: {engine}: take engine=torch")
    if engine:
        faster = {"cpu": "native", "cuda": "CUDA"}[kind]
        warnings.warn(f"{stored.path}: PyTorch runs it, slower than the {faster} engine: {engine}", stacklevel=4)
    _warn_of_unused(options, ("threads", "head", "kv_cache"), "PyTorch runs the model")
    from bitnet_lit.inference.engines.torch_engine import TorchEngine

    return TorchEngine(network())


def _no_engine(stored: StoredModel, options: EngineConfig) -> str:
    return ""


def _native_engine(stored: StoredModel, options: EngineConfig) -> Engine | str:
    """Return the native engine, or why it cannot run the model."""
    reason = why_unsupported(stored.config, stored.quant)
    if reason is None:
        try:
            threads = allowed_threads(options.threads)
            return CpuEngine(NativeModel(stored, options.head, options.kv_cache, threads))
        except NoCompilerError as error:
            reason = str(error)
    return reason


def _cuda_engine(stored: StoredModel, options: EngineConfig) -> Engine | str:
    """Return the CUDA engine, or why it cannot run the model."""
    reason = supported_models.why_unsupported(stored.config, stored.quant)
    reason = reason or supported_models.why_unusable(options.device)
    if reason is not None:
        return reason
    from bitnet_lit.inference.engines.cuda.engine import CudaEngine

    _warn_of_unused(options, ("threads",), "the CUDA engine runs the model")
    head = options.head if options.head in CUDA_HEADS else "int8"
    kv_cache = options.kv_cache if options.kv_cache in CUDA_KV_CACHES else "half"
    if (head, kv_cache) != (options.head, options.kv_cache):
        warnings.warn(
            f"head={options.head}, kv_cache={options.kv_cache}: the CUDA engine takes head={head}, kv_cache={kv_cache}",
            stacklevel=5,
        )
    try:
        return CudaEngine(stored, options.device, head, kv_cache)
    except NoKernelsError as error:
        return str(error)


def _warn_of_unused(options: EngineConfig, keys: Sequence[str], why: str) -> None:
    default = EngineConfig()
    unused = {key: getattr(options, key) for key in keys if getattr(options, key) != getattr(default, key)}
    if unused:
        given = ", ".join(f"{key}={written(value)}" for key, value in unused.items())
        warnings.warn(f"{given}: no effect, because {why}", stacklevel=5)
