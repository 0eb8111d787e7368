"""Packing stores four ternary codes in a byte. `PackedBitLinear` is the layer that runs on packed codes.

The layout of ternary and binary codes is Hugging Face's (`integrations/bitnet.py`), so `transformers` can read the same
tensor. A matrix of O rows becomes O/4 rows of bytes. Row r of the bytes holds the rows r, r + O/4, r + 2*O/4 and
r + 3*O/4 in its bit pairs, lowest bits first. A pair stores code + 1::

    bits   7 6         5 4         3 2       1 0
    row    r+3*O/4     r+2*O/4     r+O/4     r

Where 4 does not divide O, or a scheme has other codes than -1, 0 and +1, each code takes a byte: int8 (O, I).

Packing takes the codes and the scale that training used. It never computes a scale from rounded weights: their mean
magnitude is smaller than the scale, by the share of zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitnet_lit.errors import UserError
from bitnet_lit.quant.activations import ActivationRule
from bitnet_lit.quant.bit_linear import BitLinear, factors, in_dtype, input_gradient, scaled_product
from bitnet_lit.quant.kernels.interface import compute_dtype
from bitnet_lit.quant.scheme import Scheme

CODES_PER_BYTE = 4


def pack_codes(codes: Tensor) -> Tensor:
    """Pack codes in {-1, 0, +1}: (O, I), any dtype -> uint8 (O / 4, I).

    Raises:
        UserError: O is not a multiple of 4.
    """
    rows = codes.shape[0]
    if rows % CODES_PER_BYTE:
        raise UserError(
            f"a matrix of {rows} rows cannot be packed: out_features must be a multiple of {CODES_PER_BYTE}"
        )
    pairs = (codes.to(torch.int8) + 1).to(torch.uint8).view(CODES_PER_BYTE, rows // CODES_PER_BYTE, -1)
    return pairs[0] | pairs[1] << 2 | pairs[2] << 4 | pairs[3] << 6


def unpack_codes(packed: Tensor) -> Tensor:
    """Unpack codes: uint8 (O / 4, I) -> int8 (O, I). This is the inverse of `pack_codes`."""
    pairs = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    return pairs.to(torch.int8) - 1


def are_packed_codes(packed: Tensor) -> bool:
    """Return whether every pair of bits holds a code: 0, 1 or 2. The value 3 stands for no code."""
    return not bool((packed & packed >> 1 & 0b01010101).any())


def stored_codes(codes: Tensor, scheme: Scheme) -> Tensor:
    """Return codes (O, I) as a layer stores them: uint8 (O / 4, I) where four fill a byte, otherwise int8 (O, I)."""
    fills_bytes = scheme.is_ternary and len(codes) % CODES_PER_BYTE == 0
    return pack_codes(codes) if fills_bytes else codes.to(torch.int8)


class PackedProductFunction(torch.autograd.Function):
    """Compute y = x @ weight.T on frozen codes, with BitLinear's straight-through gradient for x.

    The derivative of rounding is zero almost everywhere, so autograd alone would give the layers before this one almost
    no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, factor: Tensor, activations: ActivationRule) -> Tensor:
        ctx.save_for_backward(matrix, factor)
        return _packed_product(x, matrix, factor, activations)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_y,) = grad_outputs
        return input_gradient(grad_y, *ctx.saved_tensors).to(grad_y.dtype), None, None, None


def _packed_product(x: Tensor, matrix: Tensor, factor: Tensor, activations: ActivationRule) -> Tensor:
    x_codes, x_scale = activations.quantize(x)
    return in_dtype(scaled_product(x_codes, x_scale, matrix, factor, compute_dtype(x_codes)), x.dtype)


class PackedBitLinear(nn.Module):
    """A PackedBitLinear is a BitLinear frozen to codes and scales. It runs and is not trained.

    Gradients pass through it to the layers before it, so adapters (LoRA) can be trained.

    Buffers:
        weight: packed codes, see `stored_codes`.
        weight_scale: float32; (1,), or (O, 1) for scales per row, or (O, G) for scales per group. Weights are
            codes * weight_scale. Hugging Face's packed layer divides by its scale instead; reading and writing its
            files converts it.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    matrix: Tensor
    factor: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self._activations: ActivationRule = scheme.activations
        self.register_buffer("weight", weight)
        weight_scale = weight_scale.detach().float()
        self.register_buffer("weight_scale", weight_scale if weight_scale.ndim == 2 else weight_scale.reshape(1))
        self.register_buffer("bias", None if bias is None else bias.detach())
        codes = unpack_codes(weight) if weight.dtype == torch.uint8 else weight
        self.out_features, self.in_features = codes.shape
        # Unpacked once, in the dtype of the product: unpacking for every token would cost more than the product.
        matrix, factor = factors(codes.float(), self.weight_scale)
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("factor", factor, persistent=False)

    @classmethod
    def from_codes(cls, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, scheme: Scheme) -> PackedBitLinear:
        """Make a layer from codes (O, I) and scales, for example those of a model that another tool has trained.

        The scales have the shape that the scheme's granularity gives.
        """
        return cls(stored_codes(codes, scheme), weight_scale, bias, scheme)

    @classmethod
    def from_bit_linear(cls, layer: BitLinear) -> PackedBitLinear:
        """Freeze a trained layer. The codes and the scales stay the same."""
        with torch.no_grad():
            codes, weight_scale = layer.quantized_weight()
            return cls.from_codes(codes, weight_scale, layer.bias, layer.scheme)

    def forward(self, input: Tensor) -> Tensor:
        # Without gradients the autograd Function is left out, because it costs time: decoding calls this for every
        # token and layer.
        product = PackedProductFunction.apply if torch.is_grad_enabled() and input.requires_grad else _packed_product
        y = product(input, self.matrix, self.factor, self._activations)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, quant={self.scheme.name}"
