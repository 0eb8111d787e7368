"""Learned scales against their formula, and what training does with them."""

import pytest
import torch
import torch.nn.functional as F

from bitnet_lit.config import MuonConfig, QuantConfig
from bitnet_lit.model import build_model
from bitnet_lit.quant import convert_linears, pack_linears
from bitnet_lit.quant.bit_linear import bit_linear_reference, set_strength
from bitnet_lit.quant.kernels import choose
from bitnet_lit.quant.kernels.choose import describe
from bitnet_lit.quant.kernels.interface import Kernels
from bitnet_lit.quant.learned_scale_linear import LearnedScaleLinear, learned_scale_reference
from bitnet_lit.quant.schemes import B158, B158Row, LearnedB158
from bitnet_lit.training.optimizers import build_optimizer
from tests.support import tiny_config


def literal(x, weight, gain, per_row):
    """The gain times b1.58, gradients by autograd."""
    mean = weight.detach().abs().mean(1, keepdim=True) if per_row else weight.detach().abs().mean()
    amax = x.detach().abs().amax(-1, keepdim=True)
    rounded_x = x + ((x * (127 / amax)).round() * amax / 127 - x).detach()
    codes = (weight.detach() / mean).round().clamp(-1, 1)
    return F.linear(rounded_x, weight + (codes * mean - weight).detach()) * gain.flatten()


def layer_of(per_row, seed=0):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(48, 16, bias=False))
    convert_linears(module, LearnedB158(per_row=per_row))
    torch.nn.init.uniform_(module[0].scale_gain, 0.5, 2)
    return module[0]


@pytest.mark.parametrize("per_row", [False, True])
def test_the_layer_is_the_literal_one_gradients_included(per_row):
    layer = layer_of(per_row)
    x = torch.randn(7, 48, requires_grad=True)
    leaves = [x, layer.weight, layer.scale_gain]
    results = []
    for function in (
        layer,
        lambda x: learned_scale_reference(x, layer.weight, layer.scale_gain, None, layer.scheme),
        lambda x: literal(x, layer.weight, layer.scale_gain, per_row),
    ):
        y = function(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    results[2][3] /= (48 if per_row else 48 * 16) ** 0.5  # the weights that share a scale
    for found in results[:2]:
        for ours, theirs in zip(found, results[2], strict=True):
            assert theirs.abs().sum() > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # float32 sums in another order


def test_gains_of_one_are_b158():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(48, 16), torch.randn(5, 48)
    outputs = []
    for scheme in (B158(), LearnedB158()):
        module = torch.nn.Sequential(linear)
        convert_linears(module, scheme)
        y = module(x)
        outputs.append((y, torch.autograd.grad(y.square().sum(), linear.weight)[0]))
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)


def test_a_gain_below_zero_leaves_a_small_scale_and_can_grow_again():
    layer = layer_of(False)
    torch.nn.init.constant_(layer.scale_gain, -1.0)
    layer(torch.randn(3, 48)).square().sum().backward()
    assert layer.scale_gain.grad != 0
    with torch.no_grad():
        _, scale = layer.quantized_weight()
    torch.testing.assert_close(scale, 1e-4 * layer.weight.detach().abs().mean())


class Single(Kernels):
    """Kernels that compute one layer, by b1.58."""

    name = "triton"

    def refusal(self, layers, device, dtype):
        return None

    def normed_linears(self, x, norm, layers):
        (layer,) = layers
        return (bit_linear_reference(x, layer.weight, layer.bias, B158Row()),)


def test_kernels_of_b158_compute_the_product(monkeypatch):
    layer, x = layer_of(True), torch.randn(7, 48)
    results = []
    for kernels in (None, Single()):
        monkeypatch.setitem(choose.KERNELS, "cpu", kernels)
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [layer.weight, layer.scale_gain])])
    for ours, theirs in zip(*results, strict=True):
        # Float32 sums in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_while_lambda_rises_the_gain_gets_that_share_of_its_gradient(strength):
    layer, x = layer_of(True), torch.randn(7, 48)
    gradients = []
    for value in (None, torch.tensor(strength)):
        set_strength(layer, value)
        y = layer(x)
        gradients.append(torch.autograd.grad(y.sum(), layer.scale_gain)[0])
        if strength == 0 and value is not None:
            torch.testing.assert_close(y, F.linear(x, layer.weight))
    # A sum of the outputs has the same gradient everywhere, but for the rounding of x.
    torch.testing.assert_close(gradients[1], strength * gradients[0], rtol=0.1, atol=1e-3)


def test_it_is_trained_without_weight_decay_and_packed():
    quant = QuantConfig(name="b158_learned", settings={"per_row": True})
    torch.manual_seed(0)
    model = build_model(tiny_config(), quant)
    gains = [parameter for name, parameter in model.named_parameters() if name.endswith(".scale_gain")]
    assert len(gains) == 14 and all((gain == 1).all() for gain in gains)
    optimizer = build_optimizer(model, MuonConfig())
    ids = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    model(ids, targets=ids.roll(-1, 1)).backward()
    optimizer.step()
    assert all((gain != 1).any() for gain in gains)
    held = [group for group in optimizer.param_groups if any(p is gains[0] for p in group["params"])]
    assert [group["weight_decay"] for group in held] == [0.0]
    with torch.no_grad():
        logits = model.eval()(ids)
        assert len(pack_linears(model)) == 14
        assert torch.equal(model(ids), logits)


def test_the_plan_says_that_the_reference_computes_it():
    model = build_model(tiny_config(), QuantConfig(name="b158_learned"))
    assert all(type(layer) is LearnedScaleLinear for layer in model.modules() if hasattr(layer, "scale_gain"))
    line = describe(model, torch.device("cpu"), torch.float32)
    assert line == "reference (14 layers: LearnedScaleLinear is called alone)"
