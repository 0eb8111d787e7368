"""The losses of distillation, each beside its definition."""

import pytest
import torch
import torch.nn.functional as F

from bitnet_lit.model import loss as model_loss
from bitnet_lit.model.loss import linear_loss
from bitnet_lit.training.distillation_loss import (
    DistillationGradient,
    chunked_relation_loss,
    logits_loss,
    relation_loss,
)


def random(*shape, seed, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_logits_loss_is_hintons():
    student, teacher = random(5, 7, seed=0), random(5, 7, seed=1)
    losses = logits_loss(student, teacher, 2.0)
    for row, loss in enumerate(losses):
        q = [torch.exp(z / 2) for z in student[row]]
        p = [torch.exp(z / 2) for z in teacher[row]]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected = 4 * sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # float32
    assert logits_loss(teacher, teacher, 3.0).abs().max() < 1e-5


def test_a_relation_compares_each_position_with_all_others():
    student, teacher = random(2, 3, 4, seed=2), random(2, 3, 8, seed=3)  # another width
    total = 0.0
    for batch in range(2):
        for head in range(2):
            s, t = student[batch, :, 2 * head : 2 * head + 2], teacher[batch, :, 4 * head : 4 * head + 4]
            for position in range(3):
                q = torch.softmax(torch.stack([s[position] @ s[other] for other in range(3)]) / 2**0.5, 0)
                p = torch.softmax(torch.stack([t[position] @ t[other] for other in range(3)]) / 4**0.5, 0)
                total += (p * (p / q).log()).sum().item()
    assert relation_loss(student, teacher, 2).item() == pytest.approx(total / (2 * 2 * 3), rel=1e-5)


@pytest.mark.parametrize("chunk", [2**28, 60])  # all rows at once, or 5 of them
@pytest.mark.parametrize("weights", [(1.0, 2.5), (0.0, 1.0)])
def test_chunks_of_logits_give_the_loss_and_the_gradients_of_all(monkeypatch, chunk, weights):
    monkeypatch.setattr(model_loss, "CHUNK_ELEMENTS", chunk)
    hidden, weight = random(13, 8, seed=4).float().requires_grad_(), random(12, 8, seed=5).float().requires_grad_()
    teacher, targets = random(13, 12, seed=6, scale=3.0).float(), torch.arange(13) % 12
    ce, kd, temperature = *weights, 2.0
    logits = hidden @ weight.T
    expected = ce * F.cross_entropy(logits, targets) + kd * logits_loss(logits, teacher, temperature).mean()
    expected_gradients = torch.autograd.grad(3 * expected, [hidden, weight])
    gradient, seen = DistillationGradient(ce, kd, temperature), []

    def gradient_of(part, rows, scale):
        entropies, divergences, slope = gradient(part, teacher[rows], targets[rows], scale)
        seen.append(len(part))
        return ce * entropies + kd * divergences, slope

    found = linear_loss(hidden, weight, gradient_of)
    assert seen == ([13] if chunk == 2**28 else [5, 5, 3])
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for got, wanted in zip(torch.autograd.grad(3 * found, [hidden, weight]), expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)  # sums of float32 in another order


@pytest.mark.parametrize("chunk", [2**28, 1])  # all sequences at once, or one
def test_chunks_of_relations_give_the_loss_and_the_gradient_of_all(monkeypatch, chunk):
    monkeypatch.setattr(model_loss, "CHUNK_ELEMENTS", chunk)
    student, teacher = random(3, 5, 12, seed=7).float().requires_grad_(), random(3, 5, 24, seed=8).float()
    expected = relation_loss(student, teacher, 4)
    (expected_gradient,) = torch.autograd.grad(2 * expected, student)
    found = chunked_relation_loss(student, teacher, 4)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(2 * found, student)[0], expected_gradient, rtol=1e-4, atol=1e-7)


def test_relations_under_autocast_have_a_gradient_in_the_dtype_of_the_states():
    student, teacher = random(2, 5, 8, seed=9).float().requires_grad_(), random(2, 5, 8, seed=10).float()
    (exact,) = torch.autograd.grad(relation_loss(student, teacher, 2), student)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_relation_loss(student, teacher, 2)
    (rounded,) = torch.autograd.grad(loss, student)
    assert loss.dtype == rounded.dtype == torch.float32
    assert F.cosine_similarity(rounded.flatten(), exact.flatten(), 0) > 0.99  # bfloat16 has 8 bits
