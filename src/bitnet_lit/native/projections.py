"""This module prepares the weights and the inputs of projections for the C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitnet_lit.native.library import AS_IS, SIGN, TERNARY, Activations, Call, Matrix
from bitnet_lit.quant.activations import AbsMax
from bitnet_lit.quant.bit_linear import BitLinear, factors
from bitnet_lit.quant.weights import AbsMean, PerTensor, Sign


class Rounded(NamedTuple):
    """How the C++ rounds one weight matrix.

    Attributes:
        weight: float32 (O, I): the latent weight, or its codes.
        scale: float32, one element or one for each row; None counts as 1.
        has_codes: whether the product is one of integers.
    """

    weight: Tensor
    scale: Tensor | None = None
    center: Tensor | None = None
    rounding: int = AS_IS
    has_codes: bool = False

    def fill(self, call: Call, matrix: Matrix) -> None:
        """Describe the matrix to the C++."""
        call.point(matrix, weight=self.weight, scale=self.scale, center=self.center)
        matrix.rows, matrix.rounding = self.weight.shape[0], self.rounding
        matrix.scales = 1 if self.scale is None else self.scale.numel()


def rounded(layer: nn.Linear) -> Rounded:
    """Return how the weight of `layer` is rounded.

    The scales are computed by PyTorch, so that they have the bits of the reference: codes depend on them.
    """
    weight = layer.weight.detach().contiguous()
    rule = layer._weights if isinstance(layer, BitLinear) else None
    if rule is None:
        return Rounded(weight)
    if rule == AbsMean(PerTensor()) or rule == Sign():
        statistics = rule.statistics(weight)
        assert statistics is not None
        scale, center = statistics
        return Rounded(weight, scale, center, SIGN if rule == Sign() else TERNARY, has_codes=True)
    codes, scale = rule.quantize(weight)
    matrix, factor = factors(codes, scale)
    has_codes = matrix is codes and min(rule.levels) >= -1  # the C++ stores codes + 1 without a sign
    return Rounded(matrix.contiguous(), factor.contiguous(), has_codes=has_codes)


def limit(layer: nn.Linear) -> float | None:
    """Return the largest code of the activations that enter `layer`; None where they are not quantized."""
    rule = layer._activations if isinstance(layer, BitLinear) and layer._weights is not None else None
    return None if rule is None else float(2 ** (rule.bits - 1) - 1)


def keep_inputs(call: Call, activations: Activations, tokens: int, size: int, quantized: bool) -> None:
    """Make room for the inputs of a projection, which its backward pass reads: int8 codes and scales, or floats."""
    if quantized:
        codes, scale = torch.empty(tokens, size, dtype=torch.int8), torch.empty(tokens)
        call.point(activations, codes=codes, scale=scale)
    else:
        call.point(activations, floats=torch.empty(tokens, size))


def unsupported(layers: Sequence[nn.Linear]) -> str | None:
    """Return why the C++ cannot compute one of `layers`, or None."""
    for layer in layers:
        if layer.weight.dtype != torch.float32:
            return f"weights are {layer.weight.dtype}"
        if isinstance(layer, BitLinear) and not isinstance(layer._activations, AbsMax):
            return f"activations are rounded by {type(layer._activations).__name__}"
    return None
