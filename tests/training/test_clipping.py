"""The norm of the gradient and its limit, against PyTorch's own functions."""

import pytest
import torch
from torch import nn

from bitnet_lit.training.clipping import clip_gradients, gradient_norm


@pytest.mark.parametrize("limit", [0.5, 1e3, float("inf")])
def test_norm_and_gradients_are_those_of_pytorch_to_the_last_bit(limit):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((5, 3), (7,), (2, 2, 2), (300, 100))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    gradients = [parameter.grad.clone() for parameter in parameters]
    norm = gradient_norm(gradients)
    assert torch.equal(norm, nn.utils.get_total_norm([parameter.grad for parameter in parameters]))
    clip_gradients(gradients, norm, limit)
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
