"""Quantization as a pass: build a dense network, then swap its linear layers.

Attention and feed-forward code never says "ternary". The dense twin is the same network without the pass, and the
pass works on anybody's `nn.Module` by a filter on names::

    changed = convert_linears(model, "b158", skip=["lm_head"])

The trained weights and biases stay: a converted layer holds the very parameters of the layer it replaces.

Two kinds of code do not call a linear layer but read its weight, and would stay dense without a word. torch's encoder
layers have such a path for evaluation: it is switched off. In other networks `uncalled_linears` finds them (one
such is `dt_proj` in Hugging Face's Mamba); leave them out with `skip`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.quant.bit_linear import BitLinear
from bitnet_lit.quant.packing import PackedBitLinear


def _skipped(name: str, skip: Sequence[str]) -> bool:
    return any(name == entry or name.endswith("." + entry) for entry in skip)


def _replace(module: nn.Module, swap: Callable[[str, nn.Module], nn.Module | None]) -> list[str]:
    """Replace each submodule for which `swap(name, submodule)` gives a new one; names in definition order."""
    changed: list[str] = []
    replaced: dict[nn.Module, nn.Module] = {}  # a layer used in two places stays one layer
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        new = replaced.get(layer) or swap(name, layer)
        if new is None:
            continue
        if not name:
            raise UserError(f"{type(layer).__name__} has no parent to be replaced in: wrap it in a module")
        replaced[layer] = new
        module.set_submodule(name, new)
        changed.append(name)
    return changed


def convert_linears(module: nn.Module, quant: str | QuantConfig, skip: Sequence[str] = ()) -> list[str]:
    """Turn the `nn.Linear` layers below `module` into BitLinear, in place, keeping weights and biases.

    Only plain `nn.Linear` is touched: a subclass may be called in ways of its own.

    Args:
        module: any network.
        quant: "b158", "b1", "none" (changes nothing) or a `QuantConfig`.
        skip: dense layers to leave alone: a full name, or the last parts of a dotted name. Added to `quant.skip`
            when a `QuantConfig` is given.

    Returns:
        The names of the layers it changed, in definition order.
    """
    if isinstance(quant, str):
        quant = QuantConfig(name=quant, skip=[])
    if quant.name == "none":
        return []
    left_alone = [*skip, *quant.skip]

    def swap(name: str, layer: nn.Module) -> nn.Module | None:
        if type(layer) is not nn.Linear or _skipped(name, left_alone):
            return None
        return BitLinear.from_linear(layer, quant)

    changed = _replace(module, swap)
    _leave_fused_paths(module)
    return changed


def _leave_fused_paths(module: nn.Module) -> None:
    """Make torch's encoder layers call their linear layers in evaluation too, as they do in training."""
    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoderLayer) and isinstance(encoder.linear1, BitLinear):
            encoder.activation_relu_or_gelu = 0  # the fused path knows these two activations only
        if isinstance(encoder, nn.TransformerEncoder) and any(isinstance(m, BitLinear) for m in encoder.modules()):
            encoder.use_nested_tensor = False  # what the fused path would be fed with


def uncalled_linears(module: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """Converted layers that one forward pass `module(*args, **kwargs)` never calls: code that reads their weight
    instead runs dense, and fails once they are packed. Leave them out with `skip`.

    Returns:
        Their names, in definition order.
    """
    names = {name: layer for name, layer in module.named_modules() if isinstance(layer, BitLinear)}
    called: set[nn.Module] = set()
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(layer)) for layer in names.values()]
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, layer in names.items() if layer not in called]


def pack_linears(module: nn.Module) -> list[str]:
    """Freeze every BitLinear below `module` to packed codes, in place; returns the names it changed.

    Packing a packed model changes nothing and returns an empty list.

    Raises:
        UserError: an adapter (LoRA) is merged into the weights of a quantized layer.
    """
    for name, wrapper in module.named_modules():
        # What `peft` calls a layer that wraps another, and says of it.
        if isinstance(getattr(wrapper, "base_layer", None), BitLinear) and getattr(wrapper, "merged", False):
            raise UserError(
                f"{name}: an adapter is merged into its weights, and rounding the sum would throw the adapter away: "
                "unmerge it first; it runs beside packed weights"
            )

    def swap(name: str, layer: nn.Module) -> nn.Module | None:
        return PackedBitLinear.from_bit_linear(layer) if isinstance(layer, BitLinear) else None

    return _replace(module, swap)
