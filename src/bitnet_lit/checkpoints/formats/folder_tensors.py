"""The tensors of an exported model folder, latent or packed, read one at a time from a `StoredModel`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bitnet_lit.checkpoints.safetensors_writer import LazyTensor
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.errors import UserError
from bitnet_lit.quant.packing import CODES_PER_BYTE, stored_codes
from bitnet_lit.quant.weights import WeightRule, spread_scale

MAX_ROUNDS = 20


def packed_tensors(stored: StoredModel, dtype: torch.dtype) -> Iterator[LazyTensor]:
    """Codes as `stored_codes` keeps them and scales as float32 (1,), (O, 1) or (O, G); everything else in `dtype`."""
    scheme = stored.quant.scheme
    for name, shape in stored.tensors.items():
        if name not in stored.quantized:
            yield LazyTensor(name, shape, dtype, partial(stored.tensor, name))
            continue

        def codes(name: str = name) -> Tensor:
            return stored_codes(stored.codes(name)[0], scheme)

        scales = scheme.granularity.scale_shape(shape[0], shape[1]) or (1,)

        def scale(name: str = name, scales: tuple[int, ...] = scales) -> Tensor:
            return stored.codes(name)[1].reshape(scales)

        if scheme.is_ternary:
            yield LazyTensor(name, (shape[0] // CODES_PER_BYTE, shape[1]), torch.uint8, codes)
        else:
            yield LazyTensor(name, shape, torch.int8, codes)
        yield LazyTensor(f"{name}_scale", scales, torch.float32, scale)


def round_keeping_codes(weight: Tensor, rule: WeightRule) -> Tensor:
    """bfloat16 latent weights whose codes are those of the float32 ones.

    Rounding moves a weight by up to 1/256 of itself, and the scale with it, so a weight that lies on a rounding border
    can change its code. Such weights are moved on to the next bfloat16 number on their side of the border, and near
    zero, where b1's border lies and these numbers are dense, by a small part of the scale.

    Args:
        weight: latent, float32 (O, I).

    Raises:
        UserError: no such numbers were found.
    """
    codes, scale = rule.quantize(weight)
    step = spread_scale(scale, weight.shape[1]) * 2.0**-10
    rounded = weight.bfloat16()
    for _ in range(MAX_ROUNDS):
        differing = codes - rule.quantize(rounded)[0]
        if not differing.any():
            return rounded
        up, down = torch.tensor(torch.inf, dtype=rounded.dtype), torch.tensor(-torch.inf, dtype=rounded.dtype)
        higher = rounded.nextafter(up).maximum((rounded + step).bfloat16())
        lower = rounded.nextafter(down).minimum((rounded - step).bfloat16())
        rounded = torch.where(differing > 0, higher, torch.where(differing < 0, lower, rounded))
    raise UserError("dtype=bfloat16: rounding would change codes of this model: export it as float32")


def latent_tensors(stored: StoredModel, dtype: torch.dtype) -> Iterator[LazyTensor]:
    """Full-precision weights in `dtype`.

    Raises:
        UserError: a packed model, which has none.
    """
    if stored.packed:
        raise UserError(f"{stored.path}: packed codes have no latent weights: export the folder that was trained")
    rule = stored.quant.scheme.weights
    for name, shape in stored.tensors.items():
        if rule is not None and name in stored.quantized and dtype == torch.bfloat16:

            def rounded(name: str = name, rule: WeightRule = rule) -> Tensor:
                return round_keeping_codes(stored.tensor(name), rule)

            yield LazyTensor(name, shape, dtype, rounded)
        else:
            yield LazyTensor(name, shape, dtype, partial(stored.tensor, name))
