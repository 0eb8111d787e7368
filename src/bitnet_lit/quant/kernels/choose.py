"""This module chooses what computes a quantized layer, when it is called: kernels for its device, or the reference.

The reference is the plain PyTorch code of bit_linear.py. Kernels are a class that derives from `Kernels`
(interface.py). One object of it stands in `KERNELS` under the type of its device, and says of each layer whether it can
compute it::

    kernels = chosen([q_proj, k_proj, v_proj], x)     # by the device and the dtype of x
    if kernels is not None:
        q, k, v = kernels.normed_linears(x, Norm(weight, eps), [q_proj, k_proj, v_proj])

`quant.kernel` is auto, reference, or the name of kernels. The reference computes the layers that their kernels refuse;
the plan of a run prints the reason (`describe`). Kernels that were named and cannot run are an error there. While
lambda is warmed up (`strength` is set), the reference computes everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from bitnet_lit.errors import UserError
from bitnet_lit.quant.kernels.cpu import CpuKernels
from bitnet_lit.quant.kernels.interface import Kernels, compute_dtype
from bitnet_lit.quant.kernels.triton.kernels import TritonKernels

if TYPE_CHECKING:
    from bitnet_lit.quant.bit_linear import BitLinear

KERNELS: dict[str, Kernels] = {"cuda": TritonKernels(), "cpu": CpuKernels()}
"""Kernels by the type of their device."""


def chosen(layers: Sequence[BitLinear], x: Tensor) -> Kernels | None:
    """Return the kernels that compute `layers` on the device of `x`, or None where the reference does.

    Args:
        layers: one layer or several, which read `x` or its norm.
    """
    kernels, first = KERNELS.get(x.device.type), layers[0]
    if not x.numel():  # kernels would leave the gradients of the weights as they find them in memory
        return None
    if kernels is None or getattr(first, "kernel", "auto") not in ("auto", kernels.name):
        return None
    if not kernels.takes_dense if type(first) is nn.Linear else first.strength is not None:
        return None
    is_compiled = torch.compiler.is_compiling()
    return kernels if _refusal(kernels, layers, x.device, compute_dtype(x), is_compiled) is None else None


def computing(
    network: nn.Module, device: torch.device, dtype: torch.dtype, is_compiled: bool = False
) -> Kernels | None:
    """Return the kernels that compute layers of a network in training, or None where the reference computes all.

    Args:
        dtype: the dtype of the network's products (autocast's).
        is_compiled: whether `torch.compile` compiles the network.
    """
    kernels = KERNELS.get(device.type)
    reasons = (_reason(layer, kernels, device, dtype, is_compiled) for layer in _layers(network, kernels))
    return kernels if any(reason is None for reason in reasons) else None


def _layers(network: nn.Module, kernels: Kernels | None) -> list[BitLinear]:
    """Return the quantized layers of a network; of a dense one, those that the kernels may compute."""
    from bitnet_lit.quant.bit_linear import BitLinear

    layers = [layer for layer in network.modules() if isinstance(layer, BitLinear)]
    if not layers and kernels is not None and kernels.takes_dense:
        dense = (layer for layer in network.modules() if type(layer) is nn.Linear and hasattr(layer, "kernel"))
        layers = [cast("BitLinear", layer) for layer in dense]
    return layers


def _reason(
    layer: BitLinear, kernels: Kernels | None, device: torch.device, dtype: torch.dtype, is_compiled: bool
) -> str | None:
    """Return why the reference computes a layer of a run; None where the kernels do."""
    if kernels is None:
        return f"there are no kernels for {device.type}"
    if layer.kernel not in ("auto", kernels.name):
        is_asked = layer.kernel == "reference"
        return "quant.kernel=reference" if is_asked else f"they are for another device than {device}"
    return _refusal(kernels, [layer], device, dtype, is_compiled)


def _refusal(
    kernels: Kernels, layers: Sequence[BitLinear], device: torch.device, dtype: torch.dtype, is_compiled: bool
) -> str | None:
    """Return why `kernels` cannot compute one of these layers; None if they can."""
    from bitnet_lit.quant.bit_linear import BitLinear

    if is_compiled and not kernels.is_traceable:
        return f"torch.compile cannot trace the kernels {kernels.name}"
    for layer in layers:
        if not kernels.takes_single and type(layer) not in (BitLinear, nn.Linear):
            return f"{type(layer).__name__} is called alone"
    return kernels.refusal(layers, device, dtype)


def are_alike(layers: Sequence[nn.Module]) -> bool:
    """Return whether kernels may compute `layers` together: all are BitLinear of one kind, or all are `nn.Linear`."""
    from bitnet_lit.quant.bit_linear import BitLinear

    first = layers[0]
    if type(first) is nn.Linear:
        return all(type(layer) is nn.Linear for layer in layers)
    return type(first) is BitLinear and all(
        type(layer) is BitLinear and layer.scheme == first.scheme and layer.kernel == first.kernel for layer in layers
    )


def are_unobserved(modules: Sequence[nn.Module]) -> bool:
    """Return whether no hook waits for a call of one of `modules`. Where one does, each of them must be called."""
    return not _has_any_global_hook() and not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )


def describe(
    network: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    joint: Sequence[Sequence[BitLinear]] = (),
    is_compiled: bool = False,
) -> str | None:
    """Return what will compute the quantized layers of a network, as a line for the plan of a run.

    Args:
        network: has the sizes that the run has. It may still be on another device.
        device: where it will be trained.
        dtype: the dtype of its products there (autocast's).
        joint: layers that are computed together. The first of them decides how the gradients of all are rounded.
        is_compiled: whether `torch.compile` will compile the network.

    Returns:
        "triton (112 layers), reference (2 layers: in_features 100 is not a multiple of 16)"; None where nothing is
        quantized, unless there are kernels for dense layers.

    Raises:
        UserError: `quant.kernel` names kernels that cannot compute any layer there.
    """
    kernels = KERNELS.get(device.type)
    layers = _layers(network, kernels)
    if not layers:
        return None
    asked = str(layers[0].kernel)
    name = "reference" if kernels is None else kernels.name
    counts: dict[str | None, int] = {}
    computed: list[BitLinear] = []  # by the kernels
    for layer in layers:
        reason = _reason(layer, kernels, device, dtype, is_compiled)
        counts[reason] = counts.get(reason, 0) + 1
        if reason is None:
            computed.append(layer)
    if asked not in ("auto", "reference") and None not in counts:
        raise UserError(f"quant.kernel={asked}: cannot run here ({next(iter(counts))}): take quant.kernel=auto")
    first = {layer: group[0] for group in joint for layer in group}
    parts = [
        f"{name} ({count} layers)" if reason is None else f"reference ({count} layers: {reason})"
        for reason, count in counts.items()
    ]
    if (
        kernels is not None
        and computed
        and (note := kernels.note([first.get(layer, layer) for layer in computed], dtype))
    ):
        parts.append(note)
    return ", ".join(parts)
