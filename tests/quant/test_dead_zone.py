"""Tequila's layer against its formula, gradients included."""

import pytest
import torch

from bitnet_lit.quant import convert_linears
from bitnet_lit.quant.bit_linear import set_strength
from bitnet_lit.quant.schemes import B158, Tequila


def literal(x, weight, factor, strength=1.0):
    """Y = X Q(W) + factor * (sum of the weights whose code is 0), with straight-through gradients of both roundings."""
    scale = weight.abs().mean()
    codes = (weight / scale).round().clamp(-1, 1).detach()
    amax = x.abs().amax(-1, keepdim=True)
    rounded_x = x + strength * ((x * 127 / amax).round() * amax / 127 - x).detach()
    rounded = weight + strength * (codes * scale - weight).detach()
    return rounded_x @ rounded.t() + strength * factor * torch.where(codes == 0, weight, 0).sum(1)


@pytest.mark.parametrize("strength", [None, 0.3])
def test_the_layer_is_the_formula_gradients_included(strength):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(48, 16, bias=False))
    convert_linears(module, Tequila(bias_factor=0.5))
    set_strength(module, None if strength is None else torch.tensor(strength))
    results = []
    for function in (module, lambda x: literal(x, module[0].weight, 0.5, 1.0 if strength is None else strength)):
        x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, module[0].weight])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # scales before or after the product


def test_the_bias_is_the_difference_to_b158_and_reaches_only_weights_of_code_0():
    torch.manual_seed(0)
    weight, x = torch.randn(8, 32), torch.randn(3, 32)
    layers = {}
    for scheme in (B158(), Tequila(bias_factor=1e-3)):
        linear = torch.nn.Linear(32, 8, bias=True)
        linear.weight.data.copy_(weight)
        linear.bias.data.zero_()
        module = torch.nn.Sequential(linear)
        convert_linears(module, scheme)
        layers[scheme.name] = module[0]
    tequila = layers["tequila"]
    bias = tequila.dead_zone_bias()
    torch.testing.assert_close(tequila(x), layers["b158"](x) + bias)
    (gradient,) = torch.autograd.grad(bias.sum(), tequila.weight)
    codes, _ = tequila.quantized_weight()
    torch.testing.assert_close(gradient, 1e-3 * (codes == 0))
    assert 0 < (codes == 0).sum() < codes.numel()
