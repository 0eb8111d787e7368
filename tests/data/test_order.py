"""The order is a permutation, a function of (seed, index), and looks like a shuffle."""

import itertools
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_lit.data.order import PERIOD, MixedOrder, SampleOrder, ShardOrder


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


def counted(order, epochs=3):
    """Each epoch of an order holds each sequence once, and no two epochs are alike."""
    size = order.num_samples
    seen = [order(np.arange(epoch * size, (epoch + 1) * size)) for epoch in range(epochs)]
    assert all(np.array_equal(np.sort(each), np.arange(size)) for each in seen)
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(seen, 2))
    return np.concatenate(seen)


@pytest.mark.parametrize("shards_per_block", [1, 3, 8, 50])
def test_the_order_by_shards_is_a_permutation_that_stays_in_its_blocks(shards_per_block):
    sizes = np.random.default_rng(0).integers(1, 200, 23)
    order = ShardOrder(sizes.tolist(), 3, shards_per_block)
    whole = counted(order)
    assert not np.array_equal(ShardOrder(sizes.tolist(), 4, shards_per_block)(np.arange(500)), whole[:500])
    scattered = np.random.default_rng(1).integers(0, len(whole), 300)
    assert np.array_equal(order(scattered), whole[scattered])  # a pure function of the index
    shards = np.searchsorted(np.cumsum(sizes), whole[: order.num_samples], side="right")
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for at, shard in enumerate(shards.tolist()):
        first.setdefault(shard, at)
        last[shard] = at
    assert (
        max(sum(first[shard] <= at <= last[shard] for shard in first) for at in range(len(shards))) <= shards_per_block
    )
    assert np.unique(shards[:shards_per_block]).size > 1 or shards_per_block == 1  # and they are mixed


def test_what_is_read_ahead_is_what_comes():
    order = ShardOrder([10, 20, 30, 40, 50, 60], 1, 2)
    sizes = np.cumsum([10, 20, 30, 40, 50, 60])
    for start in range(0, 500, 13):
        ahead = order.shards_ahead(start, start + 40)
        come = np.unique(np.searchsorted(sizes, order(np.arange(start, start + 41)), side="right"))
        assert set(come) <= set(ahead) and len(ahead) <= 6


@pytest.mark.parametrize("weights", [[1.0], [3, 1], [0.7, 0.2, 0.0999, 0.0001], [1e-9, 1], [1] * 9])
def test_each_corpus_has_its_share_in_every_batch_and_its_samples_in_turn(weights):
    mixed = MixedOrder([SampleOrder(100, 1)] * len(weights), [100] * len(weights), [1] * len(weights), weights)
    indices = np.arange(3 * PERIOD)
    corpora, own = mixed.split(indices)
    for corpus, weight in enumerate(weights):
        assert np.array_equal(own[corpora == corpus], np.arange((corpora == corpus).sum()))
        share = weight / sum(weights)
        for batch in (8, 32, 100):
            in_windows = np.convolve(corpora == corpus, np.ones(batch), "valid")
            # Each sample lies within half a step of where an even stream has it, so a window's count is off by less
            # than two; and a period keeps weights to 1 / PERIOD.
            assert np.abs(in_windows - share * batch).max() < 2 + batch / PERIOD
    scattered = np.random.default_rng(1).integers(0, len(indices), 300)
    again = mixed.split(scattered)
    assert np.array_equal(again[0], corpora[scattered]) and np.array_equal(again[1], own[scattered])


def test_a_mix_numbers_sequences_and_shards_one_corpus_behind_the_other():
    orders = [ShardOrder([5, 5], 1, 1), ShardOrder([7, 7, 7], 1, 1)]
    mixed = MixedOrder(orders, [10, 21], [2, 3], [1, 2])
    indices = np.arange(300)
    corpora, own = mixed.split(indices)
    assert np.array_equal(mixed(indices)[corpora == 0], orders[0](own[corpora == 0]))
    assert np.array_equal(mixed(indices)[corpora == 1], orders[1](own[corpora == 1]) + 10)
    assert set(mixed.shards_ahead(0, 12)) <= {0, 1, 2, 3, 4} and {0, 1} <= set(mixed.shards_ahead(0, 12))
    all_over = MixedOrder([orders[0], SampleOrder(9, 1)], [10, 9], [2, 1], [1, 1])
    assert all_over.shards_ahead(0, 9) is None
