"""The fast layer against the reference, gradients included; the integers it stands on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitnet_lit.config import QuantConfig
from bitnet_lit.quant import BitLinear, PackedBitLinear
from bitnet_lit.quant.activations import AbsMax
from bitnet_lit.quant.bit_linear import bit_linear_reference, set_strength
from bitnet_lit.quant.schemes import B1, B158, B158Group, B158Row
from bitnet_lit.quant.weights import AbsMean


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "quant",
    [
        *[B158(), B158(weight_scale="absmedian"), B158(activation_bits=4), B1()],
        *[B158Row(), B158Row(weight_scale="absmedian"), B158Group(group_size=8), B158Group("absmedian", group_size=12)],
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 5, 24), (24,)], ids=["batch", "vector"])
def test_layer_equals_reference_forward_and_gradient(quant, bias, shape):
    torch.manual_seed(0)
    layer = BitLinear(24, 12, bias=bias, quant=quant)
    x = torch.randn(shape)
    results = []
    for forward in (layer, lambda x: bit_linear_reference(x, layer.weight, layer.bias, quant)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *[p.grad for p in layer.parameters()]])
    for ours, reference in zip(*results, strict=True):
        # Scales enter after the product here, before it there: float32 rounding of 24 terms.
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), inputs=st.integers(1, 300), outputs=st.integers(1, 9))
def test_float_accumulators_are_the_integer_ones(seed, rows, inputs, outputs):
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    x_codes, x_scale = AbsMax().quantize(x)
    w_codes, w_scale = AbsMean().quantize(w)
    integers = x_codes.to(torch.int64) @ w_codes.to(torch.int64).T
    layer = BitLinear(inputs, outputs, quant=QuantConfig())
    with torch.no_grad():
        layer.weight.copy_(w)
        assert torch.equal(layer(x), integers.float() * (x_scale * w_scale))


def test_dense_quant_is_a_plain_linear():
    layer = BitLinear(8, 4, bias=True, quant=QuantConfig(name="none"))
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_bfloat16_autocast_keeps_codes_exact():
    torch.manual_seed(0)
    layer = BitLinear(64, 32, quant=QuantConfig())
    x = torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    # The accumulator and the scaled result each round once to bfloat16's 8 bits: 2 * 2**-9 relative.
    torch.testing.assert_close(y.float(), layer(x), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("quant", [B158(), B158Row(), B158Group(group_size=64), B1()], ids=str)
@pytest.mark.parametrize("kind", ["trained", "packed"])
@pytest.mark.parametrize("under_autocast", [True, False], ids=["autocast", "half"])
def test_float16_holds_sums_of_codes_beyond_its_largest_number(quant, kind, under_autocast):
    """A sum of 1024 codes of 127 is 130048, and float16 ends at 65504; the output itself is about 20."""
    torch.manual_seed(0)
    layer = BitLinear(1024, 8, quant=quant)
    with torch.no_grad():
        layer.weight.copy_(0.02 + 0.001 * torch.rand(8, 1024))  # codes of one sign
        if isinstance(quant, B1):
            layer.weight[4:] *= 0.1
        x = 0.9 + 0.1 * torch.rand(3, 1024)
        expected = layer(x)
    module = PackedBitLinear.from_bit_linear(layer) if kind == "packed" else layer
    if not under_autocast:
        module, x = module.half(), x.half()
    with torch.autocast("cpu", torch.float16, enabled=under_autocast):
        y = module(x)
    # Weights, activations, the sum and the output are rounded to float16's 11 bits.
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=0)


def test_warm_up_strength_is_shared_and_ends():
    model = nn.Sequential(BitLinear(8, 8, quant=QuantConfig()), BitLinear(8, 8, quant=QuantConfig()))
    x = torch.randn(2, 8)
    strength = torch.zeros(())
    set_strength(model, strength)
    dense = nn.functional.linear(nn.functional.linear(x, model[0].weight), model[1].weight)
    torch.testing.assert_close(model(x), dense)
    strength.fill_(1.0)
    almost = model(x)
    set_strength(model, None)
    # (x + (q - x)) rounds where q alone does not; the codes are the same
    torch.testing.assert_close(almost, model(x), rtol=1e-4, atol=1e-5)
