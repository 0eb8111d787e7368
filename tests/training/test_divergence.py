"""A step that is not finite: what is kept of it until somebody looks."""

from functools import partial

import pytest
import torch

from bitnet_lit.errors import Diverged
from bitnet_lit.model import batch_loss
from bitnet_lit.training.divergence import Divergence
from tests.support import tiny_model


def note(divergence, step, norm, batch):
    divergence.note(step, torch.tensor(6.0 + step), torch.tensor(norm), batch)


def test_the_first_bad_step_is_the_one_that_is_named():
    model, divergence = tiny_model(), Divergence()
    batches = torch.randint(0, 512, (5, 2, 9))
    divergence.check(model, partial(batch_loss, model))  # before the first step
    for step, norm in enumerate([1.0, 2.0]):
        note(divergence, step, norm, batches[step])
        assert divergence.found_inf.item() == 0
        divergence.check(model, partial(batch_loss, model))
    for step, norm in ((2, float("nan")), (3, 1.0), (4, float("inf"))):
        note(divergence, step, norm, batches[step])
        assert divergence.found_inf.item() == 1  # until the end, so that no later step changes the weights
    with pytest.raises(Diverged, match=r"step 2: the norm .* \(loss 8, gradient norm nan\): lower optim.learning_rate"):
        divergence.check(model, partial(batch_loss, model))
    assert torch.equal(divergence._batch, batches[2])


def test_a_batch_of_another_size_does_not_hide_a_bad_step():
    model, divergence = tiny_model(), Divergence()
    note(divergence, 0, float("nan"), torch.randint(0, 512, (4, 9)))
    note(divergence, 1, 1.0, torch.randint(0, 512, (2, 9)))
    assert divergence.found_inf.item() == 1
    with pytest.raises(Diverged, match=r"step 0: "):
        divergence.check(model, partial(batch_loss, model))


def test_an_overflow_of_the_norm_is_no_number_either_and_the_weights_that_fail_are_named():
    model, divergence = tiny_model(), Divergence()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    note(divergence, 0, float("inf"), torch.randint(0, 512, (2, 9)))
    with pytest.raises(Diverged, match=r"step 0: the output of model.layers.1.mlp\S* is not finite"):
        divergence.check(model, partial(batch_loss, model))


def test_a_skipped_step_of_the_optimizer_changes_no_weight():
    """`found_inf` is not part of PyTorch's documentation, and every GPU run relies on it."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.full((4,), float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight, torch.ones(4))
    optimizer.found_inf, weight.grad = torch.zeros(()), torch.ones(4)
    optimizer.step()
    assert weight.max() < 1
