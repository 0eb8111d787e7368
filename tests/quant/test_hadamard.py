"""The Hadamard transform against its matrix, the layers that have it, and the rounding of 4-bit activations."""

import math

import pytest
import torch
import yaml

from bitnet_lit.composed_config import CONF_DIR
from bitnet_lit.config import QuantConfig
from bitnet_lit.model import build_model
from bitnet_lit.quant import BitLinear
from bitnet_lit.quant.activations import AbsMeanActivations
from bitnet_lit.quant.hadamard import HadamardLinear, block_size, hadamard
from bitnet_lit.quant.schemes import BitNetV2, scheme_named
from tests.support import tiny_config


def matrix(size):
    """Sylvester's matrices: H_1 = [1], H_2n = [[H, H], [H, -H]]."""
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@pytest.mark.parametrize(("size", "block"), [(1, 1), (2, 2), (64, 64), (192, 64), (12, 4), (7, 1), (1024, 1024)])
def test_it_is_the_product_with_the_matrix_in_blocks(size, block):
    torch.manual_seed(0)
    assert block_size(size) == block
    x = torch.randn(3, 5, size)
    expected = (x.unflatten(-1, (-1, block)) @ matrix(block) / math.sqrt(block)).flatten(-2)
    torch.testing.assert_close(hadamard(x), expected, rtol=1e-5, atol=1e-5)  # float32 sums of up to 1024 numbers


def test_it_is_its_own_inverse_and_its_own_gradient():
    torch.manual_seed(0)
    x = torch.randn(4, 96, requires_grad=True)
    y = hadamard(x)
    torch.testing.assert_close(hadamard(y), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.square().sum(), x.square().sum())
    grad_y = torch.randn(4, 96)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad_y)[0], hadamard(grad_y))
    assert hadamard(x.bfloat16()).dtype == torch.bfloat16


def test_one_large_channel_is_spread():
    x = torch.full((1, 256), 0.1)
    x[0, 7] = 100
    assert hadamard(x).abs().amax() < 10  # 100 / sqrt(256), and the rest


def test_o_proj_and_down_proj_have_it_and_nothing_else():
    model = build_model(tiny_config(), QuantConfig(name="bitnet_v2", activation_bits=4))
    layers = {name: type(layer) for name, layer in model.named_modules() if isinstance(layer, BitLinear)}
    assert len(layers) == 14
    for name, kind in layers.items():
        assert kind is (HadamardLinear if name.endswith(("o_proj", "down_proj")) else BitLinear)
    plain = build_model(tiny_config(), QuantConfig(name="bitnet_v2", settings={"hadamard": False}))
    assert not any(isinstance(layer, HadamardLinear) for layer in plain.modules())


def test_the_scheme_of_its_name_is_that_of_its_file():
    chosen = yaml.safe_load((CONF_DIR / "quant" / "bitnet_v2.yaml").read_text())
    assert BitNetV2() == scheme_named("bitnet_v2") == QuantConfig(**chosen).scheme


def test_the_layer_transforms_and_then_rounds():
    torch.manual_seed(0)
    scheme = QuantConfig(name="bitnet_v2", activation_bits=4).scheme
    layer = HadamardLinear(64, 16, quant=scheme)
    x = torch.randn(3, 64, requires_grad=True)
    turned = x @ matrix(64) / 8
    step = turned.detach().abs().mean(-1, keepdim=True) / math.sqrt(7)
    rounded = turned + ((turned / step).round().clamp(-8, 7) * step - turned).detach()
    codes, scale = layer.quantized_weight()
    expected = rounded @ (codes * scale).t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (layer(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_activations_of_4_bits_are_rounded_as_the_paper_writes_it():
    torch.manual_seed(0)
    x = torch.randn(20, 64)
    x[0] = 0
    codes, scale = AbsMeanActivations(4).quantize(x)
    beta = x.abs().mean(-1, keepdim=True).clamp(min=1e-5)
    assert torch.equal(codes, (math.sqrt(7) / beta * x).round().clamp(-8, 7))
    torch.testing.assert_close(scale, beta / math.sqrt(7))
    assert codes.min() == -8 and codes.max() == 7  # what is more than 2.8 times the mean is clipped
