"""The definition against the papers, written out as literally as possible."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_lit.quant.activations import AbsMax
from bitnet_lit.quant.bit_linear import bit_linear_reference
from bitnet_lit.quant.schemes import B158, scheme_named
from bitnet_lit.quant.weights import AbsMean, AbsMedian, Sign


def paper_activation_quant(x):
    """Training Tips, figure 3, as printed."""
    scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    return (x * scale).round().clamp_(-128, 127) / scale


def paper_weight_quant(w):
    """Training Tips, figure 3, as printed."""
    scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
    return (w * scale).round().clamp_(-1, 1) / scale


def paper_bit_linear(x, w):
    """Training Tips, figure 3: quantize, detach what was rounded away, multiply."""
    x_quant = x + (paper_activation_quant(x) - x).detach()
    w_quant = w + (paper_weight_quant(w) - w).detach()
    return F.linear(x_quant, w_quant)


@pytest.mark.parametrize("seed", range(5))
def test_reference_is_the_paper_forward_and_gradient(seed):
    torch.manual_seed(seed)
    x, w = torch.randn(3, 7, 24), torch.randn(10, 24) * 0.02
    outputs = []
    for function in (paper_bit_linear, lambda x, w: bit_linear_reference(x, w, None, B158())):
        x_leaf, w_leaf = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = function(x_leaf, w_leaf)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        outputs.append((y, x_leaf.grad, w_leaf.grad))
    for ours, theirs in zip(*outputs, strict=True):
        # code * scale here, code / (1 / scale) in the paper: one float32 rounding apart
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_codes_are_exactly_those_of_the_paper():
    torch.manual_seed(0)
    w = torch.randn(64, 64)
    codes, scale = AbsMean().quantize(w)
    expected = (w * (1.0 / w.abs().mean())).round().clamp(-1, 1)
    assert torch.equal(codes, expected)
    assert scale == w.abs().mean()


def test_b1_is_the_sign_around_the_mean_and_zero_is_plus_one():
    w = torch.tensor([[1.0, -1.0, 0.0, 0.0]])  # mean 0: two weights equal it
    codes, scale = Sign().quantize(w)
    assert codes.tolist() == [[1, -1, 1, 1]]
    assert scale == 0.5


def test_absmedian_uses_the_median():
    w = torch.tensor([[0.1, -0.2, 0.3, -4.0, 5.0]])
    codes, scale = AbsMedian().quantize(w)
    assert scale == w.abs().median()
    assert codes.tolist() == [[0, -1, 1, -1, 1]]


@pytest.mark.parametrize("quant", ["b158", "b1"])
def test_all_zero_tensors_stay_finite(quant):
    y = bit_linear_reference(torch.zeros(2, 8), torch.zeros(4, 8), None, scheme_named(quant))
    assert y.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(bits=st.integers(2, 8), seed=st.integers(0, 2**31), exponent=st.integers(-20, 20))
def test_activation_codes_fit_their_bits_and_are_within_half_a_step(bits, seed, exponent):
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    codes, scale = AbsMax(bits).quantize(x)
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1
    assert torch.equal(codes, codes.round())
    # half a step, and float32's rounding of the quotient beside it
    assert ((codes * scale - x).abs() <= 0.5001 * scale).all()


def test_strength_moves_from_dense_to_quantized():
    torch.manual_seed(0)
    x, w = torch.randn(5, 16), torch.randn(8, 16)
    dense, quantized = F.linear(x, w), bit_linear_reference(x, w, None, B158())
    assert torch.equal(bit_linear_reference(x, w, None, B158(), 0.0), dense)
    half = bit_linear_reference(x, w, None, B158(), 0.5)
    assert not torch.allclose(half, dense) and not torch.allclose(half, quantized)


@pytest.mark.parametrize("scheme", ["b158", "b1"])
def test_codes_and_scale_do_not_depend_on_the_number_of_threads(scheme):
    """A sum over a matrix this large is divided among PyTorch's threads."""
    weight = torch.randn(512, 384, generator=torch.Generator().manual_seed(1)) * 0.02 + 1e-4
    rule = scheme_named(scheme).weights
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 4):
            torch.set_num_threads(number)
            found.append(rule.quantize(weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(codes, found[0][0]) and torch.equal(scale, found[0][1]) for codes, scale in found)
    assert torch.allclose(found[0][1], weight.abs().mean(), rtol=1e-6)
