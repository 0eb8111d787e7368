"""The order is a permutation, a function of (seed, index), and looks like a shuffle."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_lit.data.order import SampleOrder


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    order = SampleOrder(n, seed)
    indices = np.arange(epoch * n, (epoch + 1) * n)
    assert np.array_equal(np.sort(order(indices)), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 500), seed=st.integers(0, 1000), cut=st.lists(st.integers(0, 1500), max_size=6))
def test_any_partition_gives_the_same_order(n, seed, cut):
    whole = SampleOrder(n, seed)(np.arange(1500))
    borders = [0, *sorted(cut), 1500]
    parts = [SampleOrder(n, seed)(np.arange(a, b)) for a, b in pairwise(borders)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_epochs_and_seeds_differ():
    a, b, other = SampleOrder(1000, 1), SampleOrder(1000, 1), SampleOrder(1000, 2)
    first, second = a(np.arange(1000)), b(np.arange(1000, 2000))
    # two random permutations of 1000 agree in one place on average; 10 has probability 1e-7
    assert (first == second).sum() < 10
    assert (first == other(np.arange(1000))).sum() < 10


def test_places_are_uniform():
    n, seeds = 16, 4000
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), SampleOrder(n, seed)(np.arange(n))] += 1
    chi2 = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
    # 15 * 15 = 225 degrees of freedom, standard deviation sqrt(450) = 21: five of them
    assert chi2 < 225 + 5 * 21.2


def test_neighbours_are_unrelated():
    values = SampleOrder(100_000, 0)(np.arange(100_000))
    # standard error 1 / sqrt(100000) = 0.003
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02


def test_a_corpus_of_a_terabyte_costs_no_memory():
    order = SampleOrder(2**40, 7)
    values = order(np.arange(2**41, 2**41 + 1000))
    assert len(np.unique(values)) == 1000 and values.min() >= 0 and values.max() < 2**40
