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
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from bitnet_lit.errors import UserError
from bitnet_lit.quant.bit_linear import BitLinear, scheme_of
from bitnet_lit.quant.packing import CODES_PER_BYTE, PackedBitLinear
from bitnet_lit.quant.scheme import Scheme, is_skipped

if TYPE_CHECKING:
    from bitnet_lit.config import QuantConfig


def _is_plain(linear: nn.Linear) -> bool:
    """Whether swapping the layer keeps what it does: not with a weight that hooks compute before each call (pruning,
    spectral norm), nor with a `forward` that somebody put on the instance."""
    weight_is_its_own = "weight" in dict(linear.named_parameters(recurse=False))
    return weight_is_its_own and "forward" not in vars(linear)


def _replace(module: nn.Module, swap: Callable[[str, nn.Module], nn.Module | None]) -> list[str]:
    """Replace each submodule for which `swap(name, submodule)` gives a new one; names in definition order.

    Where `swap` raises, nothing is replaced.
    """
    new_layers: dict[str, nn.Module] = {}
    replaced: dict[nn.Module, nn.Module] = {}  # a layer used in two places stays one layer
    for name, layer in module.named_modules(remove_duplicate=False):
        new = replaced.get(layer) or swap(name, layer)
        if new is None:
            continue
        if not name:
            raise UserError(f"{type(layer).__name__} has no parent to be replaced in: wrap it in a module")
        new_layers[name] = replaced[layer] = new
    for name, new in new_layers.items():
        module.set_submodule(name, new)
    return list(new_layers)


def convert_linears(module: nn.Module, quant: str | Scheme | QuantConfig, skip: str | Sequence[str] = ()) -> list[str]:
    """Turn the `nn.Linear` layers below `module` into BitLinear, in place, keeping weights and biases.

    Only plain `nn.Linear` is touched: a subclass may be called in ways of its own, and a weight computed from others
    (pruning, weight norm) is not there to be kept. Matrices that are bare parameters stay dense as well. The returned
    names say what changed. Hooks come along.

    An `nn.TransformerEncoder` is converted as a whole, or inside its model, not layer by layer: it prepares padded
    batches for the fused path of its layers, which a layer alone cannot tell it to leave.

    Args:
        module: any network.
        quant: a scheme, its name ("b158"; "none" changes nothing), or a `QuantConfig`.
        skip: dense layers to leave alone, one or several: a full name, or the last parts of a dotted name. Added to
            `quant.skip` when a `QuantConfig` is given.

    Returns:
        The names of the layers it changed, in definition order.

    Raises:
        UserError: an unknown `quant`, a layer whose rows the scheme's groups do not fill, or a module that is a linear
            layer itself.
    """
    scheme = scheme_of(quant)
    if not scheme.quantizes:
        return []
    left_alone = [*([skip] if isinstance(skip, str) else skip), *getattr(quant, "skip", ())]
    make = scheme.layer or BitLinear

    def swap(name: str, layer: nn.Module) -> nn.Module | None:
        if type(layer) is not nn.Linear or not _is_plain(layer) or is_skipped(name, left_alone):
            return None
        try:
            new = make.from_linear(layer, scheme)
            _take_over(new, layer)
        except UserError as error:
            raise UserError(f"{name}: {error}, or leave it dense with skip=[{name!r}]") from None
        return new

    changed = _replace(module, swap)
    _leave_fused_paths(module)
    return changed


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Keep hooks, and whatever else a layer's owner has put on it; what the new layer has of its own stays.

    Raises:
        UserError: a tensor of the new layer's own that has no values.
    """
    for key, value in vars(old).items():
        if key in ("_parameters", "_buffers", "_modules"):
            for name, item in value.items():
                vars(new)[key].setdefault(name, item)
        elif key == "_non_persistent_buffers_set":
            new._non_persistent_buffers_set |= value
        elif key not in vars(new) or "hook" in key:  # the very dictionaries of hooks: their handles remove from them
            vars(new)[key] = value
    weight = getattr(old, "weight")  # noqa: B009  # a tensor, whatever the module's type says
    for name, tensor in [*new.named_parameters(), *new.named_buffers()]:
        if tensor.is_meta and not weight.is_meta:
            raise UserError(f"its layer makes {name} on the meta device: make it without device=")
        if tensor.device != weight.device and not weight.is_meta:
            tensor.data = tensor.data.to(weight.device)


def _leave_fused_paths(module: nn.Module) -> None:
    """Make torch's encoder layers call their linear layers in evaluation too, as they do in training."""

    def is_quantized(encoder: nn.Module) -> bool:
        return any(isinstance(layer, BitLinear) for layer in encoder.modules())

    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoderLayer) and is_quantized(encoder):
            encoder.activation_relu_or_gelu = 0  # the fused path knows these two activations only
        if isinstance(encoder, nn.TransformerEncoder) and is_quantized(encoder):
            encoder.use_nested_tensor = False  # what the fused path would be fed with


def uncalled_linears(module: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """Converted layers that one forward pass `module(*args, **kwargs)` never calls: code that reads their weight
    instead runs dense, and fails once they are packed. Leave them out with `skip`.

    It sees one pass, in the mode the module is in. Ask in training and in evaluation and on the device of the run
    where these take different paths: the CUDA kernels of Mamba read `x_proj` and `out_proj` too. An expert that no
    token was sent to is named as well. A layer that is both called and read is not.

    Returns:
        Their names, in definition order.
    """
    called: set[nn.Module] = set()
    # One hook for all modules: hooks on the layers themselves would switch torch's fused encoder path off.
    hook = register_module_forward_hook(lambda layer, *_: called.add(layer))
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    finally:
        hook.remove()
    return [name for name, layer in module.named_modules() if isinstance(layer, BitLinear) and layer not in called]


def pack_linears(module: nn.Module) -> list[str]:
    """Freeze every BitLinear below `module` to packed codes, in place; returns the names it changed.

    A scheme's own layer, which computes more than a product of codes, stays as it is: it runs on its latent weights.
    Packing a packed model changes nothing and returns an empty list. An adapter (LoRA) beside a packed layer trains
    on: gradients pass through. Hooks stay behind with the latent layers.

    Raises:
        UserError: an adapter is merged into the weights of a quantized layer or computes from them, or the rows of a
            matrix do not fill whole bytes. Nothing was changed then.
    """
    for name, layer in module.named_modules():
        _check_adapter(name, layer)
        if _packs(layer) and layer.scheme.is_ternary and layer.out_features % CODES_PER_BYTE:
            raise UserError(
                f"{name}: {layer.out_features} rows cannot be packed, out_features must be a multiple of "
                f"{CODES_PER_BYTE}: leave it dense with skip=[{name!r}] when converting"
            )

    def swap(name: str, layer: nn.Module) -> nn.Module | None:
        return PackedBitLinear.from_bit_linear(layer) if _packs(layer) else None

    return _replace(module, swap)


def _packs(layer: nn.Module) -> TypeGuard[BitLinear]:
    return isinstance(layer, BitLinear) and layer.scheme.is_plain and layer.scheme.quantizes


def _check_adapter(name: str, wrapper: nn.Module) -> None:
    """Refuse what `peft` does to the weights of the layer it wraps; it is known by its attributes, not imported."""
    if not isinstance(getattr(wrapper, "base_layer", None), BitLinear):
        return
    if merged := getattr(wrapper, "merged_adapters", None):
        raise UserError(
            f"{name}: adapter {', '.join(merged)} is merged into its weights, and rounding the sum would throw it "
            "away: unmerge it first; it runs beside packed weights"
        )
    if magnitudes := dict(getattr(wrapper, "lora_magnitude_vector", {})):
        raise UserError(
            f"{name}: adapter {', '.join(magnitudes)} is a DoRA, which computes from the latent weights at each call: "
            "use a plain LoRA, or run it unpacked"
        )
