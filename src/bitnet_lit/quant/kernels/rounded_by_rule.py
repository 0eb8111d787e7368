"""Weights that are rounded by their rule in plain PyTorch, for kernels that multiply by codes of any rule."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bitnet_lit.quant.weights import WeightRule


def round_by_rule(
    weights: Sequence[Tensor], rule: WeightRule, codes: Tensor, transposed: Tensor | None, scale: Tensor
) -> None:
    """Round the matrices of one product, and write the codes and scales into tensors that are there already.

    Args:
        weights: each float (O, I), the same I for all.
        rule: has one scale for a matrix, or one for each row.
        codes: int8 (sum of O, I).
        transposed: (I, sum of O) of a dtype that holds the codes, or None.
        scale: float32 (sum of O,), one for each output.
    """
    start = 0
    for weight in weights:
        rows = slice(start, start + len(weight))
        its_codes, its_scale = rule.quantize(weight)
        codes[rows].copy_(its_codes)
        if transposed is not None:
            transposed[:, rows].copy_(its_codes.t())
        scale[rows].copy_(its_scale.reshape(-1).expand(len(weight)))
        start += len(weight)
