"""The loss in chunks of rows against the loss of all logits, with its gradients; and where each is used."""

import math

import pytest
import torch
import torch.nn.functional as F

from bitnet_lit.model import batch_loss, loss, next_token_loss, token_losses
from bitnet_lit.model.loss import SoftmaxGradient, linear_cross_entropy, linear_token_losses
from tests.support import tiny_model


def example(tokens, hidden=16, vocabulary=50, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, hidden, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=dtype).requires_grad_()
    return states, weight, torch.randint(0, vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize(("tokens", "chunk"), [(37, 1000), (37, 50), (1, 1000), (40, 10**9)])
def test_chunks_give_the_loss_and_the_gradients_of_all_logits(monkeypatch, tokens, chunk):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk)
    states, weight, targets = example(tokens)
    expected = next_token_loss(F.linear(states, weight)[None], targets[None])
    gradients = torch.autograd.grad(0.7 * expected, (states, weight))
    found = linear_cross_entropy(states, weight, targets)
    ours = torch.autograd.grad(0.7 * found, (states, weight))
    # Both compute the softmax in float32, and sum it in another order.
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(ours, gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-7)
        assert other.abs().max() > 1e-3


def test_losses_of_tokens_in_chunks_are_those_of_all_logits(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 500)
    states, weight, targets = example(37, dtype=torch.float32)
    losses, hits = linear_token_losses(states, weight, targets)
    logits = F.linear(states, weight)
    assert torch.allclose(losses, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-6)
    assert torch.equal(hits, logits.argmax(-1) == targets)
    assert not losses.requires_grad


def test_no_tokens():
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets = torch.empty(0, dtype=torch.int64)
    assert linear_cross_entropy(hidden, weight, targets).isnan()
    assert [len(values) for values in linear_token_losses(hidden, weight, targets)] == [0, 0]


def test_softmax_gradient_of_logits_that_overflow_an_exponential():
    logits = torch.tensor([[1000.0, 0.0, -1000.0], [-100.0, -100.0, -100.0]])
    losses, gradient = SoftmaxGradient()(logits, torch.tensor([1, 2]), 0.5)
    assert losses.tolist() == pytest.approx([1000.0, math.log(3)], rel=1e-5)  # float32 at 100
    assert torch.allclose(gradient, torch.tensor([[0.5, -0.5, 0.0], [1 / 6, 1 / 6, -1 / 3]]))


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (3, 50), (5, 1024), (4, 1025), (33, 32000), (2, 50257)])
def test_the_softmax_kernel_against_its_definition(rows, vocabulary, dtype):
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, vocabulary, generator=generator) * 5).to("cuda", dtype)
    logits[0, 0], logits[-1, -1] = 1000, -math.inf
    targets = torch.randint(0, vocabulary, (rows,), generator=generator).cuda()
    targets[-1] = 0
    losses, gradient = SoftmaxGradient()(logits, targets, 0.25)
    expected, expected_gradient = SoftmaxGradient()(logits.cpu(), targets.cpu(), 0.25)
    # Sums of up to 50257 float32 in another order; the gradient is rounded to its dtype, at most a last bit apart.
    assert torch.allclose(losses.cpu(), expected, rtol=2e-6, atol=2e-6)
    assert gradient.dtype == dtype
    bit = torch.finfo(dtype).eps
    assert torch.allclose(gradient.cpu().float(), expected_gradient.float(), rtol=bit + 2e-5, atol=2e-7)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_the_softmax_kernel_gives_no_number_for_what_is_none():
    logits = torch.zeros(4, 50, device="cuda")
    logits[1, 3] = math.nan
    losses, _ = SoftmaxGradient()(logits, torch.tensor([0, 0, 50, -1], device="cuda"), 1.0)
    assert losses.isnan().tolist() == [False, True, True, True]


def test_a_model_gives_the_loss_of_its_logits():
    model = tiny_model()
    ids = torch.randint(0, 512, (3, 9), generator=torch.Generator().manual_seed(0))
    logits, targets = model(ids[:, :-1]), ids[:, 1:]
    # Kernels for the CPU sum the exponentials in another order.
    torch.testing.assert_close(batch_loss(model, ids), next_token_loss(logits, targets), atol=0, rtol=1e-6)
    losses, hits = token_losses(model, ids)
    assert torch.equal(losses, next_token_loss(logits, targets, reduction="none"))
    assert torch.equal(hits, (logits.argmax(-1) == targets).flatten())


def test_a_network_that_only_has_logits_gives_the_same_loss():
    model = tiny_model()
    ids = torch.randint(0, 512, (3, 9), generator=torch.Generator().manual_seed(0))
    wrapped = torch.nn.Sequential(model)  # as a network of the user's own, it maps ids to logits
    torch.testing.assert_close(batch_loss(wrapped, ids), batch_loss(model, ids), atol=0, rtol=1e-6)  # as above
    for one, other in zip(token_losses(wrapped, ids), token_losses(model, ids), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("quant_head", [False, True])
def test_a_model_on_a_gpu_gives_the_loss_of_its_logits(monkeypatch, quant_head):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 3000)
    model = tiny_model("none").cuda()
    if quant_head:
        from bitnet_lit.quant import convert_linears

        convert_linears(model, "b158")
    ids = torch.randint(0, 512, (3, 9), generator=torch.Generator().manual_seed(0)).cuda()
    expected = next_token_loss(model(ids[:, :-1]), ids[:, 1:])
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = batch_loss(model, ids)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5), name
    losses, _ = token_losses(model, ids)
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-5)
