"""The rules of a scheme of the user's own are tried before the first step: they must return what they say.

Training would go on with anything: codes that are not rounded train a dense model under the name of a ternary one, and
one activation scale for a whole batch lets each token see the later ones. An export would find it out, after the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitnet_lit.errors import UserError
from bitnet_lit.quant.bit_linear import BitLinear

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitnet_lit.quant.activations import ActivationRule
    from bitnet_lit.quant.weights import WeightRule

BATCH, TOKENS = 2, 3  # of the activations that are rounded
LARGEST_DRAWN = 2**26  # weights that are drawn for a layer that has none, as a dry run has it: 256 MiB


def try_rules(module: nn.Module, owner: str) -> None:
    """Round the weights of one quantized layer of each shape, and activations for it, and check codes and scales.

    Args:
        owner: the key and the class that the rules are from, for the error.

    Raises:
        UserError: a code is none of the rule's levels, or codes or scales have another shape or are not finite.
    """
    modules = module.named_modules()
    layers = {layer.weight.shape: (name, layer) for name, layer in modules if isinstance(layer, BitLinear)}
    for name, layer in layers.values():
        if layer.scheme.weights is None:
            continue
        weight = layer.weight.detach()
        if weight.is_meta and weight.numel() <= LARGEST_DRAWN:
            weight = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        if not weight.is_meta:
            _try_weights(layer.scheme.weights, weight, owner, name)
        _try_activations(layer.scheme.activations, layer.in_features, owner, name)


def _check(where: str, codes: Tensor, due_codes: tuple[int, ...], each: str, scale: Tensor) -> None:
    if tuple(codes.shape) != due_codes:
        raise UserError(f"{where} codes of the shape {tuple(codes.shape)}: return a code for each {each}")
    if not (codes.isfinite().all() and scale.isfinite().all()):
        raise UserError(f"{where} codes or scales that are not finite: correct quantize")


def _try_weights(rule: WeightRule, weight: Tensor, owner: str, name: str) -> None:
    codes, scale = rule.quantize(weight)
    shape = tuple(weight.shape)
    where = f"{owner}: the rule {type(rule).__name__} rounds {name} {shape} to"
    _check(where, codes, shape, "weight", scale)
    due = rule.granularity.scale_shape(*shape)
    if tuple(scale.shape) != due and not (scale.numel() == 1 and due == ()):
        raise UserError(
            f"{where} scales of the shape {tuple(scale.shape)}, and its granularity says {due}: correct one of them"
        )
    is_level = torch.isin(codes, torch.tensor(rule.levels, dtype=codes.dtype, device=codes.device))
    if not is_level.all():
        levels = ", ".join(map(str, rule.levels))
        code = codes[~is_level][0].item()
        raise UserError(f"{where} codes such as {code:g}, and its levels are {levels}: correct quantize or levels")


def _try_activations(rule: ActivationRule, inputs: int, owner: str, name: str) -> None:
    """Round normally distributed activations, among them a token of zeros and one with a large value."""
    x = torch.randn(BATCH, TOKENS, inputs, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[0, 1, 0] = 0, 1000
    codes, scale = rule.quantize(x)
    shape, due = tuple(x.shape), (BATCH, TOKENS, 1)
    where = f"{owner}: the rule {type(rule).__name__} rounds activations {shape} for {name} to"
    _check(where, codes, shape, "value", scale)
    if tuple(scale.shape) != due:
        raise UserError(f"{where} scales of the shape {tuple(scale.shape)}: return one for each token, {due}")
    if rule.bits not in range(2, 9):
        raise UserError(f"{where} {rule.bits} bits: bits must lie in 2..8 (codes are stored as int8)")
    limit = 2 ** (rule.bits - 1)
    is_code = (codes == codes.round()) & (codes >= -limit) & (codes < limit)
    if not is_code.all():
        code = codes[~is_code][0].item()
        raise UserError(
            f"{where} codes such as {code:g}, and with {rule.bits} bits they are the integers from {-limit} to "
            f"{limit - 1}: correct quantize or bits"
        )
