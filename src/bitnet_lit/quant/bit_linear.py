"""BitLinear: the linear layer whose three matrix products see integers.

Forward::

    y = (x_codes @ weight_codes.T) * (x_scale * weight_scale)

The product runs on *whole numbers*, and the two scales enter once, at the end. In float32 that product is exact in
any order of summation as long as |sum| <= 2**24, that is for in_features up to 131072: so an int8 kernel, a packed
2-bit kernel and this layer agree in every integer accumulator, and only the last multiplication can round
differently. This is what makes the trained model, bit for bit, the model that runs.

Backward (straight-through: rounding counts as the identity)::

    grad_x      = (grad_y @ weight_codes) * weight_scale
    grad_weight = grad_y.T @ (x_codes * x_scale)

Codes are kept for the backward pass as int8, a quarter of what autograd would keep of float activations. The latent
weight stays a plain `weight` parameter in the optimizer's precision: state dicts, tied weights and optimizers see
an ordinary `nn.Linear`.

Different from the paper: no norm inside the layer (the network puts one before every projection) and the scales are
applied after the product rather than before it; the same value up to float rounding.

Under autocast the codes are cast to its dtype: bfloat16 holds every integer up to 256, so codes stay exact and only
the product's output is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_lit.config import QuantConfig
from bitnet_lit.quant.functional import bit_linear_reference, quantize_activations, quantize_weight


def _compute_dtype(x: Tensor) -> torch.dtype:
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


class BitLinearFunction(torch.autograd.Function):
    """y = x @ weight.T on integer codes with a straight-through backward; shapes as in `bit_linear_reference`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, quant: QuantConfig) -> Tensor:
        dtype = _compute_dtype(x)
        x_codes, x_scale = quantize_activations(x, quant.activation_bits)
        weight_codes, weight_scale = quantize_weight(weight, quant)
        ctx.save_for_backward(x_codes.to(torch.int8), x_scale, weight_codes.to(torch.int8), weight_scale)
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        accumulator = F.linear(x_codes.to(dtype), weight_codes.to(dtype))
        return (accumulator * (x_scale * weight_scale)).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_y,) = grad_outputs
        x_codes, x_scale, weight_codes, weight_scale = ctx.saved_tensors
        dtype = grad_y.dtype
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = ((grad_y @ weight_codes.to(dtype)) * weight_scale).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            x = (x_codes * x_scale).to(dtype)
            flat_grad, flat_x = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
            grad_weight = (flat_grad.T @ flat_x).to(ctx.weight_dtype)
        return grad_x, grad_weight, None


class BitLinear(nn.Linear):
    """An `nn.Linear` whose forward pass is quantized by `quant`; shapes and parameters are those of `nn.Linear`.

    Attributes:
        quant: the rule; ``QuantConfig(name="none")`` makes this a plain linear layer.
        strength: lambda of the warm-up as a float32 tensor of shape (), or None for fully quantized.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        quant: QuantConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.quant = quant
        self.strength: Tensor | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, quant: QuantConfig) -> BitLinear:
        """The same layer quantized: its very parameters (not copies), so optimizers and ties stay valid."""
        layer = cls(linear.in_features, linear.out_features, bias=False, quant=quant, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.training = linear.training
        return layer

    def forward(self, input: Tensor) -> Tensor:
        if self.strength is not None or self.quant.name == "none":
            strength = 1.0 if self.strength is None else self.strength
            return bit_linear_reference(input, self.weight, self.bias, self.quant, strength)
        y = BitLinearFunction.apply(input, self.weight, self.quant)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quant={self.quant.name}"


def set_strength(module: nn.Module, strength: Tensor | None) -> None:
    """Set lambda of the warm-up on every BitLinear below `module`; one shared tensor of shape (), or None for 1."""
    for layer in module.modules():
        if isinstance(layer, BitLinear):
            layer.strength = strength
