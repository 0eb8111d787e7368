"""Packed weights: four ternary codes in a byte, and the layer that runs on them.

The layout of ternary and binary codes is Hugging Face's (`integrations/bitnet.py`), so one tensor serves both: a matrix
of O rows becomes O/4 rows of bytes, and byte row r holds the rows r, r + O/4, r + 2*O/4, r + 3*O/4 in its bit pairs,
lowest first. A pair stores code + 1::

    bits   7 6         5 4         3 2       1 0
    row    r+3*O/4     r+2*O/4     r+O/4     r

Codes of other levels than -1, 0 and +1 are stored one in a byte, int8 (O, I).

Packing takes the codes and the scale that training used; it never derives a scale from already rounded values
(absmean of a ternary matrix is not its scale: it would shrink by the share of zeros).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_lit.errors import UserError
from bitnet_lit.quant.activations import ActivationRule
from bitnet_lit.quant.bit_linear import BitLinear, factors, in_dtype, input_gradient
from bitnet_lit.quant.scheme import Scheme

CODES_PER_BYTE = 4


def pack_codes(codes: Tensor) -> Tensor:
    """(O, I) codes in {-1, 0, +1}, any dtype -> uint8 (O / 4, I).

    Raises:
        UserError: O is no multiple of 4.
    """
    rows = codes.shape[0]
    if rows % CODES_PER_BYTE:
        raise UserError(
            f"a matrix of {rows} rows cannot be packed: out_features must be a multiple of {CODES_PER_BYTE}"
        )
    pairs = (codes.to(torch.int8) + 1).to(torch.uint8).view(CODES_PER_BYTE, rows // CODES_PER_BYTE, -1)
    return pairs[0] | pairs[1] << 2 | pairs[2] << 4 | pairs[3] << 6


def unpack_codes(packed: Tensor) -> Tensor:
    """uint8 (O / 4, I) -> int8 (O, I) codes; the inverse of `pack_codes`."""
    pairs = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    return pairs.to(torch.int8) - 1


def are_packed_codes(packed: Tensor) -> bool:
    """Whether every pair of bits holds a code: the fourth value of two bits, 3, is none."""
    return not bool((packed & packed >> 1 & 0b01010101).any())


def stored_codes(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes (O, I) as they are kept: uint8 (O / 4, I) where two bits hold them, else int8 (O, I).

    Raises:
        UserError: O is no multiple of 4.
    """
    return pack_codes(codes) if scheme.is_ternary else codes.to(torch.int8)


class PackedProductFunction(torch.autograd.Function):
    """y = x @ weight.T on frozen codes, with BitLinear's gradient for x: rounding counts as the identity.

    Autograd alone would find rounded activations constant, and hardly anything would reach what lies before the layer.
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
    return in_dtype(F.linear(x_codes, matrix) * (x_scale * factor), x.dtype)


class PackedBitLinear(nn.Module):
    """A BitLinear frozen to codes and scales: runs, does not train. Gradients pass through it, to adapters say.

    Buffers:
        weight: packed codes, see `stored_codes`.
        weight_scale: float32 (1,), or (O, 1), (O, G) where rows or groups have their own; multiplies (Hugging Face's
            packed layer divides by its own: the border converts).
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
        codes = unpack_codes(weight) if scheme.is_ternary else weight
        self.out_features, self.in_features = codes.shape
        # Unpacked once, in the dtype the product runs in: unpacking at every token would cost more than the product.
        matrix, factor = factors(codes.float(), self.weight_scale)
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("factor", factor, persistent=False)

    @classmethod
    def from_codes(cls, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, scheme: Scheme) -> PackedBitLinear:
        """A layer of codes (O, I) and scales in the shape of the scheme's granularity, as another tool trained them."""
        return cls(stored_codes(codes, scheme), weight_scale, bias, scheme)

    @classmethod
    def from_bit_linear(cls, layer: BitLinear) -> PackedBitLinear:
        """Freeze a trained layer: the same integers, the same scales."""
        with torch.no_grad():
            codes, weight_scale = layer.quantized_weight()
            return cls.from_codes(codes, weight_scale, layer.bias, layer.scheme)

    def forward(self, input: Tensor) -> Tensor:
        # Without a gradient no Function around it: decoding calls this for every token and layer.
        product = PackedProductFunction.apply if torch.is_grad_enabled() and input.requires_grad else _packed_product
        y = product(input, self.matrix, self.factor, self._activations)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, quant={self.scheme.name}"
