"""Quantization is a pass over a finished network: build it dense, then replace its linear layers.

So the code of attention and feed-forward layers knows nothing of quantization, and the dense twin is the same network
without the pass. The pass works on any `nn.Module`; names choose the layers that stay dense::

    changed = convert_linears(model, "b158", skip=["lm_head"])

The trained weights and biases stay: a converted layer holds the same parameters as the layer that it replaces.

Some code reads the weight of a linear layer without calling the layer. Such code would compute with the dense weight,
and no error would say so. The encoder layers of torch do this in evaluation; the pass switches that path off. In other
networks `uncalled_linears` finds such layers (one is `dt_proj` in Hugging Face's Mamba): leave them dense with `skip`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from bitnet_lit.errors import UserError, nearest
from bitnet_lit.quant.bit_linear import BitLinear, scheme_of
from bitnet_lit.quant.packing import PackedBitLinear
from bitnet_lit.quant.scheme import Scheme, is_skipped

if TYPE_CHECKING:
    from bitnet_lit.config import QuantConfig


def _is_plain(linear: nn.Linear) -> bool:
    """Return whether the layer still does the same once it is replaced.

    It does not where hooks compute its weight before each call (pruning, spectral norm), or where somebody has set
    `forward` on the instance.
    """
    weight_is_its_own = "weight" in dict(linear.named_parameters(recurse=False))
    return weight_is_its_own and "forward" not in vars(linear)


def _replace(module: nn.Module, swap: Callable[[str, nn.Module], nn.Module | None]) -> list[str]:
    """Replace each submodule for which `swap(name, submodule)` returns a new one, and return the names in order.

    If `swap` raises, nothing is replaced.
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


def check_skip(module: nn.Module, skip: Sequence[str], key: str) -> None:
    """Refuse a name that no linear layer has: a misspelled layer would be rounded without a word.

    Args:
        skip: names of layers, as `convert_linears` takes them.
        key: what the user calls this list, for the error.

    Raises:
        UserError: the name, and the layer that is spelled almost like it.
    """
    modules = module.named_modules(remove_duplicate=False)  # a layer used in two places has two names
    layers = [name for name, layer in modules if isinstance(layer, nn.Linear | PackedBitLinear)]
    for entry in skip:
        if not any(is_skipped(layer, [entry]) for layer in layers):
            known = sorted({layer.rpartition(".")[2] for layer in layers})
            near = nearest(entry, known) or nearest(entry, layers)
            remedy = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{key}=[{entry}]: no linear layer of that name: {remedy}")


def convert_linears(module: nn.Module, quant: str | Scheme | QuantConfig, skip: str | Sequence[str] = ()) -> list[str]:
    """Replace the `nn.Linear` layers in `module` by BitLinear, in place. Weights, biases and hooks are kept.

    Some layers stay dense. A subclass of `nn.Linear` does, because its forward pass may differ. So does a layer whose
    weight is computed from other tensors (pruning, weight norm), and a matrix that is a bare parameter.

    Convert an `nn.TransformerEncoder` as a whole, or the model that holds it, and not its layers one by one: only then
    can its fused evaluation path be switched off.

    Args:
        module: any network.
        quant: a scheme, its name ("b158"; "none" changes nothing), or a `QuantConfig`.
        skip: one layer that stays dense, or several: a full name, or the last parts of a dotted name. With a
            `QuantConfig` these are added to `quant.skip`.

    Returns:
        The names of the replaced layers, in definition order.

    Raises:
        UserError: `quant` is unknown, no layer has a name in `skip`, the group size of the scheme does not divide a
            layer's in_features, or `module` is itself a linear layer.
    """
    scheme = scheme_of(quant)
    skip = [skip] if isinstance(skip, str) else list(skip)
    check_skip(module, skip, "skip")
    if not scheme.quantizes:
        return []
    left_alone = [*skip, *getattr(quant, "skip", ())]

    def swap(name: str, layer: nn.Module) -> nn.Module | None:
        if type(layer) is not nn.Linear or not _is_plain(layer) or is_skipped(name, left_alone):
            return None
        try:
            new = (scheme.layer_for(name) or BitLinear).from_linear(layer, scheme)
            new.kernel, new.grad = getattr(quant, "kernel", new.kernel), getattr(quant, "grad", new.grad)
            _take_over(new, layer)
        except UserError as error:
            raise UserError(f"{name}: {error}, or leave it dense with skip=[{name!r}]") from None
        return new

    changed = _replace(module, swap)
    _leave_fused_paths(module)
    return changed


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Copy the old layer's hooks and extra attributes to the new layer. What the new layer already has is kept.

    Raises:
        UserError: a tensor that only the new layer has is on the meta device, so it has no values.
    """
    for key, value in vars(old).items():
        if key in ("_parameters", "_buffers", "_modules"):
            for name, item in value.items():
                vars(new)[key].setdefault(name, item)
        elif key == "_non_persistent_buffers_set":
            new._non_persistent_buffers_set |= value
        elif key not in vars(new) or "hook" in key:  # the same dictionaries: a hook's handle removes it from them
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
            encoder.activation_relu_or_gelu = 0  # says that it is neither, and the fused path supports no other
        if isinstance(encoder, nn.TransformerEncoder) and is_quantized(encoder):
            encoder.use_nested_tensor = False  # only the fused path can read a nested tensor


def uncalled_linears(module: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """Return the converted layers that one forward pass `module(*args, **kwargs)` does not call.

    Some code reads the weight of such a layer instead. It computes with the dense weight, and fails once the layer is
    packed. Leave the layer dense with `skip`.

    The result holds for this one pass. A network may take another path in training, in evaluation or on another device:
    call this once for each. (The CUDA kernels of Mamba read `x_proj` and `out_proj` too.) An expert that gets no token
    is in the result as well. A layer that is both called and read is not.

    Returns:
        The names, in definition order.
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
    """Replace every BitLinear in `module` by a frozen layer with packed codes, in place.

    A scheme with a layer class of its own is left alone, because that layer computes more than a product of codes; it
    runs on its latent weights. A model that is packed already does not change. An adapter (LoRA) beside a packed layer
    can still be trained: gradients pass through the packed layer. Hooks are not kept.

    Returns:
        The names of the replaced layers, in definition order.

    Raises:
        UserError: an adapter is merged into the weights of a quantized layer, or computes from them. Nothing has been
            changed then.
    """
    for name, layer in module.named_modules():
        _check_adapter(name, layer)

    def swap(name: str, layer: nn.Module) -> nn.Module | None:
        return PackedBitLinear.from_bit_linear(layer) if _packs(layer) else None

    return _replace(module, swap)


def _packs(layer: nn.Module) -> TypeGuard[BitLinear]:
    return isinstance(layer, BitLinear) and layer.scheme.is_plain and layer.scheme.quantizes


def _check_adapter(name: str, wrapper: nn.Module) -> None:
    """Refuse an adapter of `peft` that changes or reads the weights of its layer. `peft` is not imported for this."""
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
