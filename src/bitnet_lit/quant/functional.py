"""The definition of 1.58 bit, in functions that read like the papers.

A BitNet projection multiplies integers: activations rounded to int8 with one scale per token, weights rounded to
{-1, 0, +1} with one scale per matrix. Both are *fake-quantized* while training: the forward pass uses the rounded
value, the gradient passes as if nothing had been rounded (the straight-through estimator), so the latent
full-precision weight keeps learning until it crosses a rounding border.

One scale convention everywhere, weights and activations alike::

    weight ~= weight_codes * weight_scale          codes in {-1, 0, +1} (b158) or {-1, +1} (b1)
    x      ~= x_codes * x_scale                    codes in -128..127 at 8 bits

Axis letters: B... leading axes, I in_features, O out_features.

Sources: "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, unilm repository) for b158; BitNet
(arXiv 2310.11453) for b1; "BitNet b1.58 Reloaded" (arXiv 2407.09527) for absmedian.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError

SCALE_MIN = 1e-5  # Training Tips, figure 3: keeps an all-zero tensor from dividing by zero


def quantize_activations(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Round each token to signed integers by its largest magnitude.

    Args:
        x: activations, float, shape (B..., I).
        bits: width of the codes; 8 gives -128..127.

    Returns:
        codes: whole numbers as float32, shape (B..., I).
        x_scale: float32, shape (B..., 1); ``x ~= codes * x_scale``.
    """
    x = x.float()
    limit = 2 ** (bits - 1) - 1
    amax = x.abs().amax(dim=-1, keepdim=True).clamp(min=SCALE_MIN)
    codes = (x * (limit / amax)).round().clamp(-limit - 1, limit)
    return codes, amax / limit


def weight_statistics(weight: Tensor, quant: QuantConfig) -> tuple[Tensor, Tensor]:
    """The two numbers that a matrix is rounded by.

    Args:
        weight: latent weight, float32, shape (O, I).

    Returns:
        weight_scale: float32, shape ().
        center: float32, shape (); what b1 compares with, 0 for b158.
    """
    magnitude = weight.abs()
    scale = magnitude.median() if quant.weight_scale == "absmedian" else magnitude.mean()
    center = weight.mean() if quant.name == "b1" else torch.zeros_like(scale)
    return scale.clamp(min=SCALE_MIN), center


def quantize_weight(weight: Tensor, quant: QuantConfig) -> tuple[Tensor, Tensor]:
    """Round a matrix to ternary (b158) or binary (b1) codes with one scale.

    ``sign(0)`` is +1 for b1: a weight equal to the mean must still get a code that one bit can store.

    Args:
        weight: latent weight, float, shape (O, I).
        quant: the rule; ``quant.name`` is b158 or b1.

    Returns:
        codes: whole numbers as float32, shape (O, I).
        weight_scale: float32, shape (); ``weight ~= codes * weight_scale``.

    Raises:
        UserError: a rule without codes.
    """
    weight = weight.float()
    scale, center = weight_statistics(weight, quant)
    if quant.name == "b158":
        # Multiplying by the reciprocal, not dividing, is what Microsoft and Hugging Face do: it decides ties.
        return (weight * (1.0 / scale)).round().clamp(-1, 1), scale
    if quant.name != "b1":
        raise UserError(f"quant.name={quant.name}: has no codes to round to: take b158 or b1")
    return torch.where(weight >= center, 1.0, -1.0), scale


def straight_through(value: Tensor, rounded: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    """``rounded`` in the forward pass, the identity in the backward pass.

    Args:
        value: what the gradient goes to.
        rounded: what the forward pass uses, same shape.
        strength: lambda of the warm-up, 0 (``value``) to 1 (``rounded``).
    """
    return value + strength * (rounded - value).detach()


def bit_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, quant: QuantConfig, strength: Tensor | float = 1.0
) -> Tensor:
    """The definition of BitLinear: every fast path is tested against these lines, gradients included.

    Args:
        x: float, shape (B..., I).
        weight: latent weight, float, shape (O, I).
        bias: float, shape (O,), or None; never quantized.
        strength: lambda of the warm-up; 1 is fully quantized.

    Returns:
        float, shape (B..., O).
    """
    if quant.name == "none":
        return F.linear(x, weight, bias)
    x_codes, x_scale = quantize_activations(x, quant.activation_bits)
    weight_codes, weight_scale = quantize_weight(weight, quant)
    x = straight_through(x, (x_codes * x_scale).to(x.dtype), strength)
    weight = straight_through(weight, (weight_codes * weight_scale).to(weight.dtype), strength)
    return F.linear(x, weight, bias)
