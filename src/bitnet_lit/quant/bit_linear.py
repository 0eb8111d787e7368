"""BitLinear is a linear layer that multiplies integer codes of its activations by integer codes of its weights.

The forward pass, with one scale for the matrix (weights.py has the other granularities)::

    y = (x_codes @ weight_codes.T) * (x_scale * weight_scale)

The matrix product runs on *integers*, and the two scales are applied once, at the end. In float32 the product is exact
in any order of summation as long as |sum| <= 2**24, that is, for in_features up to 131072. So an int8 kernel, a packed
2-bit kernel and this layer agree in every integer accumulator, and only the last multiplication can round differently.
This is why the trained model and the exported model are the same model.

The code of this module is the reference. Faster kernels compute a layer where there are some for its device (kernels/).

Scales per row are also applied after the product, one to each output. Scales per group cannot be applied at the end:
there the product runs on codes * scale. A kernel that sums the integers of each group agrees with it up to the rounding
of float32 sums.

The backward pass is straight-through: it treats rounding as the identity::

    grad_x      = (grad_y @ weight_codes) * weight_scale
    grad_weight = grad_y.T @ (x_codes * x_scale)

Codes are kept for the backward pass as int8, a quarter of the memory of float32 activations. The latent weight stays a
plain `weight` parameter in the optimizer's precision: state dicts, tied weights and optimizers see an ordinary
`nn.Linear`.

Two things differ from the paper. The layer has no norm of its own: the network puts one before every projection. And
the scales are applied after the product rather than before it, which gives the same value up to float rounding.

Under autocast both operands of the product are cast to autocast's dtype. bfloat16 holds every integer up to 256, and
float16 up to 2048, so codes stay exact and only the output is rounded. Scales per group are part of an operand, so each
of them is rounded too, by at most 1/512 of its value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_lit.errors import UserError
from bitnet_lit.quant.activations import ActivationRule
from bitnet_lit.quant.kernels.choose import chosen
from bitnet_lit.quant.kernels.interface import compute_dtype
from bitnet_lit.quant.scheme import Scheme
from bitnet_lit.quant.schemes import scheme_named
from bitnet_lit.quant.weights import spread_scale

if TYPE_CHECKING:
    from bitnet_lit.config import QuantConfig


def scheme_of(quant: str | Scheme | QuantConfig) -> Scheme:
    """Return the scheme that is given by its name ("b158"), in a config, or as the object itself.

    Raises:
        UserError: the name is unknown, or `quant` is none of the three.
    """
    scheme = scheme_named(quant) if isinstance(quant, str) else getattr(quant, "scheme", quant)
    if not isinstance(scheme, Scheme):
        raise UserError(f"quant={quant!r}: must be a scheme, its name (b158, b1, none), or a QuantConfig")
    return scheme


def straight_through(value: Tensor, rounded: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    """Return ``rounded`` in the forward pass, and pass the gradient on to ``value`` unchanged in the backward pass.

    Args:
        value: the tensor that gets the gradient.
        rounded: the tensor that the forward pass uses, same shape.
        strength: lambda of the warm-up, from 0 (``value``) to 1 (``rounded``).
    """
    return value + strength * (rounded - value).detach()


def bit_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, scheme: Scheme, strength: Tensor | float = 1.0
) -> Tensor:
    """Compute BitLinear as it is defined. Every fast path is tested against this function, gradients included.

    Args:
        x: float, shape (B..., I).
        weight: latent weight, float, shape (O, I).
        bias: float, shape (O,), or None; never quantized.
        strength: lambda of the warm-up; 1 is fully quantized.

    Returns:
        float, shape (B..., O).
    """
    if scheme.weights is None:
        return F.linear(x, weight, bias)
    x_codes, x_scale = scheme.activations.quantize(x)
    weight_codes, weight_scale = scheme.weights.quantize(weight)
    rounded = weight_codes * spread_scale(weight_scale, weight.shape[1])
    x = straight_through(x, (x_codes * x_scale).to(x.dtype), strength)
    weight = straight_through(weight, rounded.to(weight.dtype), strength)
    return F.linear(x, weight, bias)


def factors(codes: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two factors of a quantized layer: y = (x_codes @ matrix.T) * (x_scale * factor).

    Args:
        codes: any dtype, (O, I).
        weight_scale: float32, (), (1,), (O, 1) or (O, G).

    Returns:
        matrix: (O, I). It holds the codes; where a row has several scales, it holds codes * scale.
        factor: float32, (), (1,) or (O,). It is 1 where a row has several scales.
    """
    if weight_scale.ndim < 2:
        return codes, weight_scale
    if weight_scale.shape[1] == 1:
        return codes, weight_scale.squeeze(1)
    return codes * spread_scale(weight_scale, codes.shape[1]), weight_scale.new_ones(())


def scaled_product(x_codes: Tensor, x_scale: Tensor, matrix: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (x_codes @ matrix.T) * (x_scale * factor), float32 (B..., O). `matrix` and `factor` come from `factors`.

    float16 ends at 65504, and 516 codes of 127 add up to more. There the codes are divided by 128, and their scale is
    multiplied by it. Both are exact, and rows of 65504 ternary codes fit.

    Args:
        x_codes, x_scale: as `ActivationRule.quantize` returns them.
        dtype: of the product's operands.
    """
    if dtype == torch.float16:
        x_codes, x_scale = x_codes / 128, x_scale * 128
    return F.linear(x_codes.to(dtype), matrix.to(dtype)) * (x_scale * factor)


def input_gradient(grad_y: Tensor, matrix: Tensor, factor: Tensor) -> Tensor:
    """Return the gradient of the input, (B..., O) -> (B..., I), for the two results of `factors`.

    The caller casts it to the dtype of the input.
    """
    matrix = matrix.to(grad_y.dtype)
    if factor.numel() == 1:
        return (grad_y @ matrix) * factor
    return (grad_y * factor).to(grad_y.dtype) @ matrix


def scale_gradient(grad_weight: Tensor, codes: Tensor, weight_scale: Tensor) -> Tensor:
    """Return the gradient of the scales, in their shape: that of codes * scale, with fixed codes.

    Args:
        grad_weight: the gradient of the rounded weights, (O, I).
        codes: any dtype, (O, I).
    """
    products = grad_weight.float() * codes
    if weight_scale.ndim < 2:
        return products.sum().reshape(weight_scale.shape)
    grad_scale: Tensor = products.unflatten(1, (weight_scale.shape[1], -1)).sum(-1)
    return grad_scale


def in_dtype(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `y` in `dtype`, as the result of an autograd function.

    Where `y` has that dtype already, this must not call `y.to(dtype)`. Under `torch.compile` the gradients of such a
    result are zero, and no error is raised (torch 2.11, every backend; torch 2.13 is right).
    """
    return y if y.dtype == dtype else y.to(dtype)


class BitLinearFunction(torch.autograd.Function):
    """Compute y = x @ weight.T on integer codes, with a straight-through backward pass.

    The shapes are those of `bit_linear_reference`. The weight comes with its codes and scales (`WeightRule.quantize`):
    it is not read, and gets the gradient. Scales that are trained get the gradient of codes * scale.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, weight_codes: Tensor, weight_scale: Tensor, activations: ActivationRule
    ) -> Tensor:
        dtype = compute_dtype(x)
        x_codes, x_scale = activations.quantize(x)
        ctx.save_for_backward(x_codes.to(torch.int8), x_scale, weight_codes.to(torch.int8), weight_scale)
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        return in_dtype(scaled_product(x_codes, x_scale, *factors(weight_codes, weight_scale), dtype), dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, None]:
        (grad_y,) = grad_outputs
        x_codes, x_scale, weight_codes, weight_scale = ctx.saved_tensors
        grad_x = grad_weight = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_x = input_gradient(grad_y, *factors(weight_codes, weight_scale)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            x = (x_codes * x_scale).to(grad_y.dtype)
            flat_grad, flat_x = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
            grad_weight = (flat_grad.T @ flat_x).to(ctx.weight_dtype)
            if ctx.needs_input_grad[3]:
                grad_scale = scale_gradient(grad_weight, weight_codes, weight_scale)
        return grad_x, grad_weight, None, grad_scale, None


def integer_product(
    x: Tensor, weight: Tensor, weight_codes: Tensor, weight_scale: Tensor, activations: ActivationRule
) -> Tensor:
    """Return `BitLinearFunction` of its arguments."""
    y: Tensor = BitLinearFunction.apply(x, weight, weight_codes, weight_scale, activations)  # type: ignore[no-untyped-call]
    return y


class BitLinear(nn.Linear):
    """A BitLinear is an `nn.Linear` with a quantized forward pass. Shapes and parameters are those of `nn.Linear`.

    Args:
        quant: a scheme, its name ("b158"), or a config that holds one; "none" makes this a plain linear layer.

    Attributes:
        scheme: how the layer is quantized.
        strength: lambda of the warm-up as a float32 tensor of shape (), or None where the layer is fully quantized.
        kernel: what computes the layer, as `quant.kernel` says it: auto, reference, or the name of kernels.
        grad: how kernels compute gradients, as `quant.grad` says it: auto, fp8, fp8_all or bf16.
        held: the rounded weights, where they are rounded less often than the layer is called (kernels/hold.py).

    Raises:
        UserError: the scheme cannot round a matrix of these sizes, or `quant` is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        quant: str | Scheme | QuantConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.scheme = scheme_of(quant)
        self.scheme.check_sizes(out_features, in_features)
        # Kept as attributes: a scheme makes its rules anew at each access, and every forward pass reads them.
        self._weights, self._activations = self.scheme.weights, self.scheme.activations
        self.strength: Tensor | None = None
        self.kernel, self.grad = "auto", "auto"
        self.held: Any = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, quant: str | Scheme | QuantConfig) -> BitLinear:
        """Make a quantized layer of a linear layer.

        Both hold the same parameters, which are not copied, so optimizers and tied weights stay valid.
        """
        layer = cls(linear.in_features, linear.out_features, bias=False, quant=quant, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.training = linear.training
        return layer

    def quantized_weight(self) -> tuple[Tensor, Tensor]:
        """Return the codes and the scales that the forward pass uses; see `WeightRule.quantize`.

        Raises:
            UserError: the layer is dense.
        """
        if self._weights is None:
            raise UserError(f"quant={self.scheme.name}: has no codes to round to: take b158 or b1")
        return self._weights.quantize(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        if self.strength is not None or self._weights is None:
            strength = 1.0 if self.strength is None else self.strength
            return bit_linear_reference(input, self.weight, self.bias, self.scheme, strength)
        if (kernels := chosen([self], input)) is not None and kernels.takes_single:
            return kernels.normed_linears(input, None, [self])[0]
        y = integer_product(input, self.weight, *self._weights.quantize(self.weight.detach()), self._activations)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quant={self.scheme.name}"


def set_strength(module: nn.Module, strength: Tensor | None) -> None:
    """Set lambda of the warm-up on every BitLinear in `module`.

    Args:
        strength: one tensor of shape () that all layers share, or None for 1 (fully quantized).
    """
    for layer in module.modules():
        if isinstance(layer, BitLinear):
            layer.strength = strength
