"""Quantization as a pass: build a dense network, then swap its linear layers.

Attention and feed-forward code never says "ternary". The dense twin is the same network without the pass, and the
pass works on anybody's `nn.Module` by a filter on names::

    changed = convert_linears(model, "b158", skip=["lm_head"])

The trained weights and biases stay: a converted layer holds the very parameters of the layer it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    return _replace(module, swap)


def pack_linears(module: nn.Module) -> list[str]:
    """Freeze every BitLinear below `module` to packed codes, in place; returns the names it changed.

    Packing a packed model changes nothing and returns an empty list.
    """

    def swap(name: str, layer: nn.Module) -> nn.Module | None:
        return PackedBitLinear.from_bit_linear(layer) if isinstance(layer, BitLinear) else None

    return _replace(module, swap)
