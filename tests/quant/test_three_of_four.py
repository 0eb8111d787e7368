"""Sherry's rule against a literal version of it, and the codes that fast kernels get from it."""

import pytest
import torch

from bitnet_lit.quant.bit_linear import bit_linear_reference
from bitnet_lit.quant.kernels.rounded_by_rule import round_by_rule
from bitnet_lit.quant.schemes import Sherry
from bitnet_lit.quant.three_of_four import ThreeOfFour
from bitnet_lit.quant.weights import AbsMean, PerRow


def literal(weight):
    """Sherry, section 3: drop the smallest of four, keep the signs of the others, and scale by their mean magnitude."""
    codes, kept = torch.zeros_like(weight), []
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], 4):
            block = weight[row, first : first + 4].tolist()
            zero = min(range(4), key=lambda i: abs(block[i]))
            for i in range(4):
                if i != zero:
                    codes[row, first + i] = 1.0 if block[i] >= 0 else -1.0
                    kept.append(abs(block[i]))
    return codes, sum(kept) / len(kept)


@pytest.mark.parametrize("shape", [(1, 4), (6, 32), (300, 128)], ids=str)
def test_the_rule_is_the_literal_one(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.02
    codes, scale = ThreeOfFour().quantize(weight)
    expected, expected_scale = literal(weight)
    assert torch.equal(codes, expected)
    assert scale == pytest.approx(expected_scale, rel=1e-6)  # float32 sums of up to 28,800 numbers


def test_equal_weights_and_zeros_leave_three_codes():
    weight = torch.tensor([[0.0, 0, 0, 0, 1, 1, -1, 1, 0, -2, 0, 2, -0.0, 3, 3, 3]])
    codes, scale = ThreeOfFour().quantize(weight)
    assert codes.tolist() == [[0, 1, 1, 1, 0, 1, -1, 1, 0, -1, 1, 1, 0, 1, 1, 1]]
    assert scale == (3 + 4 + 9) / 12
    assert ThreeOfFour().quantize(torch.zeros(4, 8))[1] == pytest.approx(1e-5)


def test_a_weight_that_is_not_a_number_reaches_the_scale():
    weight = torch.randn(4, 8)
    weight[2, 3] = float("nan")
    assert ThreeOfFour().quantize(weight)[1].isnan()


def test_gradients_are_straight_through():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 16), torch.randn(8, 16, requires_grad=True)
    bit_linear_reference(x, weight, None, Sherry()).sum().backward()
    codes, scale = Sherry().activations.quantize(x)
    torch.testing.assert_close(weight.grad, (codes * scale).sum(0).expand(8, 16))


@pytest.mark.parametrize("rule", [ThreeOfFour(), AbsMean(PerRow())], ids=str)
def test_codes_for_a_product_of_several_matrices(rule):
    torch.manual_seed(0)
    weights = [torch.randn(rows, 32) for rows in (8, 4, 12)]
    codes, transposed, scale = torch.empty(24, 32, dtype=torch.int8), torch.empty(32, 24), torch.empty(24)
    round_by_rule(weights, rule, codes, transposed, scale)
    assert torch.equal(transposed.t(), codes.float())
    for its_codes, its_scale, weight in zip(codes.split([8, 4, 12]), scale.split([8, 4, 12]), weights, strict=True):
        expected, expected_scale = rule.quantize(weight)
        assert torch.equal(its_codes.float(), expected)
        assert torch.equal(its_scale, expected_scale.reshape(-1).expand(len(weight)))
