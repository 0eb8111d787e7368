"""`SampleOrder` says which sample comes when: it is a shuffle without a table.

Global sample i is at place i % N of epoch i // N, and a permutation of 0..N-1, keyed by seed and epoch, says which
sequence is at that place. The permutation is a Feistel network (Luby and Rackoff 1988): a number is cut into two
halves, and each round combines one half with a hash of the other by XOR, which can be undone whatever the hash is. So
it is a bijection by construction, costs a few integer operations per sample, and takes no memory, however large the
corpus. The network permutes a power of four; a number that comes out above N - 1 is permuted again until it is below N
("cycle walking").

The order of a run is thus a pure function of (seed, i): workers, ranks and resuming cannot change it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6  # four make a good permutation of a large domain; small ones need more


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit numbers by the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SampleOrder:
    """Maps the global indices of samples to sequences.

    Args:
        num_samples: N, the number of sequences in the corpus; at least 1.
        seed: another seed gives another order.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        assert num_samples >= 1, num_samples
        self.num_samples = num_samples
        self.seed = seed
        half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequences, int64 (B,) in 0..N-1, of samples, int64 (B,), by their global indices."""
        epochs, places = np.divmod(indices.astype(np.uint64), np.uint64(self.num_samples))
        keys = _mix(_mix(np.full_like(epochs, self.seed % 2**64)) + epochs)
        round_keys = np.stack([_mix(keys + np.uint64(number)) for number in range(ROUNDS)])
        values = self._permute(places, round_keys)
        outside = np.flatnonzero(values >= self.num_samples)
        while outside.size:
            values[outside] = self._permute(values[outside], round_keys[:, outside])
            outside = outside[values[outside] >= self.num_samples]
        return values.astype(np.int64)

    def _permute(self, values: NDArray[np.uint64], round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Permute numbers, uint64 (B,) in 0..4**half_bits - 1, by keys for each round, uint64 (ROUNDS, B)."""
        left, right = values >> self._half_bits, values & self._mask
        for keys in round_keys:
            left, right = right, left ^ (_mix(keys + right) & self._mask)
        return (left << self._half_bits) | right
