"""Sampling against definitions written out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_lit.config import GenerationConfig
from bitnet_lit.errors import UserError
from bitnet_lit.inference.sampling import (
    NotFiniteError,
    Sampler,
    distribution,
    nucleus,
    penalize_repeats,
)

OFF = {"temperature": 1.0, "top_p": 1.0}


def floats(*values):
    return np.array(values, dtype=np.float32)


def test_temperature_zero_takes_the_largest():
    assert distribution(floats(1, 3, 2), [], GenerationConfig(temperature=0)).tolist() == [0, 1, 0]


def test_each_filter_by_hand():
    logits = np.log(floats(0.5, 0.3, 0.15, 0.05))
    plain = distribution(logits, [], GenerationConfig(**OFF))
    assert plain.tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05])
    assert distribution(logits, [], GenerationConfig(**OFF, top_k=2)).tolist() == pytest.approx([0.625, 0.375, 0, 0])
    likely = distribution(logits, [], GenerationConfig(temperature=1.0, top_p=0.7))
    assert likely.tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert distribution(logits, [], GenerationConfig(**OFF, min_p=0.35)).tolist() == pytest.approx([0.625, 0.375, 0, 0])
    hot = distribution(logits, [], GenerationConfig(temperature=0.5, top_p=1.0))
    assert hot.tolist() == pytest.approx([0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365])


def test_repeats_are_penalized_by_sign_once_and_only_recent_ones():
    logits = floats(2, -2, 1)
    assert penalize_repeats(logits, [0, 0, 1], 2.0).tolist() == [1.0, -4.0, 1.0]
    options = GenerationConfig(temperature=0, repeat_penalty=10.0, repeat_last_n=1)
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
    logits = np.random.default_rng(seed).standard_normal(size, dtype=np.float32) * 5
    options = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    probabilities = distribution(logits, [], options)
    assert probabilities[logits.argmax()] > 0
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    if top_k:
        assert (probabilities > 0).sum() <= top_k
    assert 0 <= Sampler(options).draw(logits, []) < size


def test_frequencies_follow_the_distribution():
    logits = np.log(floats(0.6, 0.3, 0.1))
    sampler = Sampler(GenerationConfig(**OFF, seed=0))
    counts = np.bincount([sampler.draw(logits, []) for _ in range(3000)], minlength=3) / 3000
    # standard error sqrt(0.24 / 3000) = 0.009: four of them
    assert counts.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.036)


def test_a_sample_is_a_function_of_seed_and_index():
    logits = np.zeros(1000, dtype=np.float32)

    def draws(seed, index):
        sampler = Sampler(GenerationConfig(**OFF, seed=seed), index)
        return [sampler.draw(logits, []) for _ in range(5)]

    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(seed, index)) for seed in (1, 2) for index in (0, 1)}) == 4
    assert draws(None, 0) != draws(None, 0)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 3000), top_p=st.floats(0.01, 0.9999), spread=st.floats(0, 12))
def test_the_nucleus_is_that_of_a_sorted_vocabulary(seed, size, top_p, spread):
    logits = np.random.default_rng(seed).standard_normal(size) * spread
    probabilities = (np.exp(logits) / np.exp(logits).sum()).astype(np.float32)
    order = np.argsort(-probabilities, kind="stable")
    ordered = probabilities[order].astype(np.float64)
    assert nucleus(probabilities, top_p).tolist() == order[np.cumsum(ordered) - ordered < top_p].tolist()


def test_a_seed_gives_these_numbers_on_every_machine():
    sampler = Sampler(GenerationConfig(**OFF, seed=1))
    assert [sampler.draw(np.zeros(1000, dtype=np.float32), []) for _ in range(5)] == [511, 950, 144, 948, 311]


@pytest.mark.parametrize(
    "option",
    [
        *(
            {"temperature": value}
            for value in (float("nan"), float("inf"), 1e-300, 1e300, -1, True, "0.8", None, 10**400)
        ),
        *({"repeat_penalty": value} for value in (float("nan"), float("inf"), 1e-300, 0, -1.0, "1", None)),
        *({"top_p": value} for value in (float("nan"), 0, 1.5, True)),
        *({"min_p": value} for value in (float("nan"), -0.1, 1.0, False)),
        *({"top_k": value} for value in (-1, 1.5, True, float("nan"), "5")),
        *({"repeat_last_n": value} for value in (-1, 2.0, None)),
    ],
    ids=str,
)
def test_options_that_are_none_are_refused(option):
    ((key, _),) = option.items()
    with pytest.raises(UserError, match=rf"{key}=.*: must "):
        GenerationConfig(**option)


def test_extreme_options_are_those_that_they_come_near_to():
    logits = np.array([2, -3e38, 3e38, 1], dtype=np.float32)
    greedy = distribution(logits, [], GenerationConfig(temperature=1e-30))
    assert greedy.tolist() == [0, 0, 1, 0]
    assert distribution(logits[[0, 3]], [], GenerationConfig(temperature=1e30, top_p=1.0)).tolist() == [0.5, 0.5]
    for penalty in (1e-30, 1e30):
        options = GenerationConfig(repeat_penalty=penalty, repeat_last_n=10**30, top_k=10**30, **OFF)
        probabilities = distribution(logits, [0, 1, 2], options)
        assert np.isfinite(probabilities).all() and probabilities.sum() == 1


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("values", [(1, np.nan), (np.inf, 0), (np.inf, np.inf), (-np.inf, -np.inf)], ids=str)
def test_logits_that_are_no_numbers_are_named(values, temperature):
    with pytest.raises(NotFiniteError):
        distribution(floats(*values), [], GenerationConfig(temperature=temperature))


def test_a_logit_of_minus_infinity_is_never_drawn():
    assert distribution(floats(0, -np.inf), [], GenerationConfig()).tolist() == [1, 0]


def test_seeds_have_128_bits_and_a_sign():
    draws = [
        Sampler(GenerationConfig(seed=seed)).draw(np.zeros(10**6, np.float32), [])
        for seed in (1, -1, 2**128, -(2**128))
    ]
    assert len(set(draws)) == 4
