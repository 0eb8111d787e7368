"""Sampling against definitions written out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_lit.inference.sampling import Sampler, SamplingOptions, distribution, penalize_repeats

OFF = {"temperature": 1.0, "top_p": 1.0}


def test_temperature_zero_takes_the_largest():
    assert distribution(torch.tensor([1.0, 3.0, 2.0]), [], SamplingOptions(temperature=0)).tolist() == [0, 1, 0]


def test_each_filter_by_hand():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    plain = distribution(logits, [], SamplingOptions(**OFF))
    torch.testing.assert_close(plain, torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert distribution(logits, [], SamplingOptions(**OFF, top_k=2)).tolist() == pytest.approx([0.625, 0.375, 0, 0])
    nucleus = distribution(logits, [], SamplingOptions(temperature=1.0, top_p=0.7))
    assert nucleus.tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert distribution(logits, [], SamplingOptions(**OFF, min_p=0.35)).tolist() == pytest.approx([0.625, 0.375, 0, 0])
    hot = distribution(logits, [], SamplingOptions(temperature=0.5, top_p=1.0))
    assert hot.tolist() == pytest.approx([0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365])


def test_repeats_are_penalized_by_sign_once_and_only_recent_ones():
    logits = torch.tensor([2.0, -2.0, 1.0])
    assert penalize_repeats(logits, [0, 0, 1], 2.0).tolist() == [1.0, -4.0, 1.0]
    options = SamplingOptions(temperature=0, repeat_penalty=10.0, repeat_last_n=1)
    assert distribution(logits, [0, 1], options).argmax() == 0  # the 0 is too long ago
    assert distribution(logits, [1, 0], options).argmax() == 2


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 40),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.99),
    temperature=st.floats(0.05, 5),
)
def test_there_is_always_something_to_draw(seed, size, top_k, top_p, min_p, temperature):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 5
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probabilities = distribution(logits, [], options)
    assert probabilities[logits.argmax()] > 0
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    if top_k:
        assert (probabilities > 0).sum() <= top_k
    assert 0 <= Sampler(options, seed).draw(logits, []) < size


def test_frequencies_follow_the_distribution():
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    sampler = Sampler(SamplingOptions(**OFF), seed=0)
    counts = torch.bincount(torch.tensor([sampler.draw(logits, []) for _ in range(3000)]), minlength=3) / 3000
    # standard error sqrt(0.24 / 3000) = 0.009: four of them
    torch.testing.assert_close(counts, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.036)


def test_a_sample_is_a_function_of_seed_and_index():
    logits = torch.zeros(1000)

    def draws(seed, index):
        sampler = Sampler(SamplingOptions(**OFF), seed, index)
        return [sampler.draw(logits, []) for _ in range(5)]

    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(seed, index)) for seed in (1, 2) for index in (0, 1)}) == 4
    assert draws(None, 0) != draws(None, 0)
