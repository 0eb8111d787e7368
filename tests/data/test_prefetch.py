"""Batches that a thread reads ahead for a GPU: their order, their errors, and the end of the thread."""

import threading

import numpy as np
import pytest
import torch

from bitnet_lit.data.batches import BatchLoader
from bitnet_lit.data.prefetch import DEPTH, prefetched

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def numbered(read, stop=100, error=None):
    for number in range(stop):
        read.append(number)
        yield torch.full((4, 3), number)
    if error is not None:
        raise error


def test_batches_come_in_order_and_few_are_read_ahead():
    read = []
    batches = prefetched(numbered(read), CUDA)
    for number in range(20):
        batch = next(batches)
        assert batch.is_cuda and batch.unique().tolist() == [number]
        assert len(read) <= number + DEPTH + 2  # one more is in the thread's hands
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "bitnet_lit batches"]


def test_an_error_comes_in_the_place_of_its_batch_and_an_end_is_an_end():
    batches = prefetched(numbered([], stop=5, error=OSError("gone")), CUDA)
    assert [int(next(batches)[0, 0]) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="gone"):
        next(batches)
    assert len(list(prefetched(numbered([], stop=5), CUDA))) == 5


def test_a_loader_pins_what_it_hands_over():
    items = [(np.full((2, 3), number), 2, 0, True) for number in range(3)]
    batches = list(BatchLoader(items, pinned=True))
    assert [(ids.is_pinned(), int(ids[0, 0]), *others) for ids, *others in batches] == [
        (True, number, 2, 0, True) for number in range(3)
    ]
