"""An order says which sample comes when: it is a shuffle without a table of the samples.

Global sample i is at place i % N of epoch i // N. `SampleOrder` (data.shuffle=global) permutes the places of an epoch:
each sequence may come at any of them. `ShardOrder` (data.shuffle=shards) permutes the shards, takes them in blocks, and
permutes the sequences of each block. It reads from a few shards at a time, and so streams a corpus that is larger than
the disk. `MixedOrder` deals the samples out to several corpora (data.mix), each of which has an order of its own.

A permutation of 0..N-1 is a Feistel network (Luby and Rackoff 1988): a number is cut into two halves, and each round
combines one half with a hash of the other by XOR, which can be undone whatever the hash is. So it is a bijection by
construction, costs a few integer operations per sample, and takes no memory, however large the corpus. The network
permutes a power of four; a number that comes out above N - 1 is permuted again until it is below N ("cycle walking").

The order of a run is thus a pure function of (seed, i): workers, ranks and resuming cannot change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6  # four make a good permutation of a large domain; small ones need more
PERIOD = 2**16  # samples after which the pattern of a mix comes again: weights are kept to 1 / PERIOD


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit numbers by the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _epoch_keys(seed: int, epochs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return _mix(_mix(np.full_like(epochs, seed % 2**64)) + epochs)


class Permutation:
    """Permutes 0..size-1, differently for each key."""

    def __init__(self, size: int) -> None:
        self.size = size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)

    def __call__(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return what the values, uint64 (B,), become by their keys, uint64 (B,)."""
        round_keys = np.stack([_mix(keys + np.uint64(number)) for number in range(ROUNDS)])
        values = self._permute(values, round_keys)
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = self._permute(values[outside], round_keys[:, outside])
            outside = outside[values[outside] >= self.size]
        return values

    def _permute(self, values: NDArray[np.uint64], round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Permute numbers, uint64 (B,) in 0..4**half_bits - 1, by keys for each round, uint64 (ROUNDS, B)."""
        left, right = values >> self._half_bits, values & self._mask
        for keys in round_keys:
            left, right = right, left ^ (_mix(keys + right) & self._mask)
        return (left << self._half_bits) | right


class Order(Protocol):
    """Maps the global indices of samples to sequences."""

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequences, int64 (B,), of samples, int64 (B,), by their global indices."""

    def shards_ahead(self, start: int, stop: int) -> list[int] | None:
        """Return the numbers of the shards that the samples [start, stop) and those soon after them lie in.

        None: any of them, so that there is nothing to read ahead.
        """


class SampleOrder:
    """Shuffles all sequences of a corpus.

    Args:
        num_samples: N, the number of sequences in the corpus; at least 1.
        seed: another seed gives another order.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        assert num_samples >= 1, num_samples
        self.num_samples = num_samples
        self.seed = seed
        self._permutation = Permutation(num_samples)

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Order`. The sequences are in 0..N-1."""
        epochs, places = np.divmod(indices.astype(np.uint64), np.uint64(self.num_samples))
        return self._permutation(places, _epoch_keys(self.seed, epochs)).astype(np.int64)

    def shards_ahead(self, start: int, stop: int) -> None:
        """See `Order`."""


class ShardOrder:
    """Shuffles shards, and the sequences inside blocks of shards.

    Args:
        shard_sizes: the number of sequences of each shard, in order; each at least 1.
        seed: another seed gives another order.
        shards_per_block: K, shards whose sequences are shuffled with each other.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, shards_per_block: int) -> None:
        self.seed, self.shards_per_block = seed, shards_per_block
        self._sizes = np.array(shard_sizes, dtype=np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self.num_samples = int(self._sizes.sum())
        assert self._sizes.min() >= 1
        self._epoch, self._table = -1, (self._sizes, self._sizes)

    def _blocks(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards of an epoch in their order, int64 (S,), and the place behind each block's last sample."""
        if self._epoch != epoch:
            key = _epoch_keys(self.seed, np.array([epoch], dtype=np.uint64))
            numbers = np.arange(1, len(self._sizes) + 1).astype(np.uint64)
            shards = np.argsort(_mix(key + numbers), kind="stable")
            starts = np.arange(0, len(shards), self.shards_per_block)
            self._epoch, self._table = epoch, (shards, np.cumsum(np.add.reduceat(self._sizes[shards], starts)))
        return self._table

    def _members(self, shards: NDArray[np.int64], block: int) -> NDArray[np.int64]:
        return shards[block * self.shards_per_block : (block + 1) * self.shards_per_block]

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Order`. The sequences are numbered through all shards."""
        epochs, places = np.divmod(indices, self.num_samples)
        sequences = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            of_epoch = np.flatnonzero(epochs == epoch)
            shards, ends = self._blocks(epoch)
            blocks = np.searchsorted(ends, places[of_epoch], side="right")
            for block in np.unique(blocks).tolist():
                chosen = of_epoch[blocks == block]
                size = int(ends[block] - (ends[block - 1] if block else 0))
                inside = places[chosen] - (ends[block] - size)
                sequences[chosen] = self._in_block(self._members(shards, block), size, inside, epoch, block)
        return sequences

    def _in_block(
        self, members: NDArray[np.int64], size: int, places: NDArray[np.int64], epoch: int, block: int
    ) -> NDArray[np.int64]:
        """Return the sequences at places of a block, int64 (B,): permuted, and found in the block's shards."""
        key = _mix(_epoch_keys(self.seed, np.array([epoch], dtype=np.uint64)) ^ np.uint64((block + 1) << 32))
        places = Permutation(size)(places.astype(np.uint64), np.repeat(key, len(places))).astype(np.int64)
        ends = np.cumsum(self._sizes[members])
        which = np.searchsorted(ends, places, side="right")
        found = members[which]
        return self._firsts[found] + places - (ends[which] - self._sizes[found])

    def shards_ahead(self, start: int, stop: int) -> list[int]:
        """See `Order`: the shards of the blocks that the samples lie in, and of the block behind them."""
        ahead: dict[int, None] = {}
        while True:
            epoch, place = divmod(start, self.num_samples)
            shards, ends = self._blocks(epoch)
            block = int(np.searchsorted(ends, place, side="right"))
            ahead |= dict.fromkeys(self._members(shards, block).tolist())
            if start >= stop:
                return list(ahead)
            start = epoch * self.num_samples + int(ends[block])


class MixedOrder:
    """Deals samples out to several corpora by their weights, and takes the samples of each corpus in its own order.

    The pattern is fixed: in a period of PERIOD samples, corpus c has q_c = weight * PERIOD of them, and its k-th comes
    where (k + 1/2) / q_c of the period is over. So among any n samples that follow each other, each corpus has its
    share to within two or so, and how many samples of a corpus lie before sample i is known without counting them.

    Args:
        orders: of the corpora.
        num_sequences: of the corpora. The sequences of the second corpus are numbered behind those of the first.
        num_shards: of the corpora, numbered in the same way.
        weights: the corpora's shares of the samples; they need not add up to 1.
    """

    def __init__(
        self, orders: Sequence[Order], num_sequences: Sequence[int], num_shards: Sequence[int], weights: Sequence[float]
    ) -> None:
        self.orders = orders
        self._offsets = np.cumsum(num_sequences) - np.array(num_sequences)
        self._shard_offsets = np.cumsum(num_shards) - np.array(num_shards)
        self._quotas = quotas(weights)
        times = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in self._quotas if quota])
        corpora = np.repeat(np.arange(len(weights)), self._quotas)
        self._pattern = corpora[np.argsort(times, kind="stable")]
        # For each place of the period and each corpus: how many of its samples lie before.
        taken = np.cumsum(self._pattern[:, None] == np.arange(len(weights)), axis=0, dtype=np.int64)
        self._before = np.concatenate([np.zeros((1, len(weights)), dtype=np.int64), taken])

    def split(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the corpus of each sample, int64 (B,), and its index among the samples of that corpus, int64 (B,)."""
        periods, places = np.divmod(indices, PERIOD)
        corpora = self._pattern[places]
        return corpora, periods * self._quotas[corpora] + self._before[places, corpora]

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Order`."""
        corpora, own = self.split(indices)
        sequences = np.empty_like(indices)
        for corpus, (order, offset) in enumerate(zip(self.orders, self._offsets, strict=True)):
            of_corpus = np.flatnonzero(corpora == corpus)
            if of_corpus.size:
                sequences[of_corpus] = order(own[of_corpus]) + offset
        return sequences

    def shards_ahead(self, start: int, stop: int) -> list[int] | None:
        """See `Order`."""
        ahead: list[int] = []
        for corpus, (order, offset) in enumerate(zip(self.orders, self._shard_offsets, strict=True)):
            first, last = (
                at // PERIOD * int(self._quotas[corpus]) + int(self._before[at % PERIOD, corpus])
                for at in (start, stop)
            )
            shards = order.shards_ahead(first, last)
            if shards is None:
                return None
            ahead += [int(offset) + shard for shard in shards]
        return ahead


def quotas(weights: Sequence[float]) -> NDArray[np.int64]:
    """Return how many of PERIOD samples each corpus has, int64 (C,): at least one each, PERIOD together.

    What is left over by rounding down goes to the largest remainders.
    """
    exact = np.array(weights, dtype=np.float64) / sum(weights) * PERIOD
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    for corpus in by_remainder[: max(0, PERIOD - int(counts.sum()))]:
        counts[corpus] += 1
    counts[counts.argmax()] -= counts.sum() - PERIOD  # tiny weights were rounded up to one
    return counts
