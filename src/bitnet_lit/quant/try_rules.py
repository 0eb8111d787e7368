"""Weight rules of the user's own are tried before the first step: they must return what they say.

Training would go on with anything: codes that are not rounded train a dense model under the name of a ternary one. An
export would find it out, after the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitnet_lit.errors import UserError
from bitnet_lit.quant.bit_linear import BitLinear

if TYPE_CHECKING:
    from torch import nn


def try_rules(module: nn.Module, owner: str) -> None:
    """Round the weights of one quantized layer of each shape, and check the codes and the scales.

    Args:
        owner: the key and the class that the rule is from, for the error.

    Raises:
        UserError: a code is none of the rule's levels, or codes or scales have another shape or are not finite.
    """
    modules = module.named_modules()
    layers = {layer.weight.shape: (name, layer) for name, layer in modules if isinstance(layer, BitLinear)}
    for name, layer in layers.values():
        rule, shape = layer.scheme.weights, tuple(layer.weight.shape)
        if rule is None:
            continue
        codes, scale = rule.quantize(layer.weight.detach())
        where = f"{owner}: the rule {type(rule).__name__} rounds {name} {shape} to"
        due = rule.granularity.scale_shape(*shape)
        if tuple(codes.shape) != shape:
            raise UserError(f"{where} codes of the shape {tuple(codes.shape)}: return a code for each weight")
        if tuple(scale.shape) != due and not (scale.numel() == 1 and due == ()):
            raise UserError(
                f"{where} scales of the shape {tuple(scale.shape)}, and its granularity says {due}: correct one of them"
            )
        if not (codes.isfinite().all() and scale.isfinite().all()):
            raise UserError(f"{where} codes or scales that are not finite: correct quantize")
        is_level = torch.isin(codes, torch.tensor(rule.levels, dtype=codes.dtype, device=codes.device))
        if not is_level.all():
            levels = ", ".join(map(str, rule.levels))
            raise UserError(
                f"{where} codes such as {codes[~is_level][0].item():g}, and its levels are {levels}: correct quantize "
                "or levels"
            )
