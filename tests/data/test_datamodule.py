"""Which sample goes where: the same order for any number of ranks and workers, and where a run is resumed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitnet_lit.config import DataConfig
from bitnet_lit.data.batches import ValidationBatches
from bitnet_lit.data.corpora import open_corpora
from bitnet_lit.data.datamodule import BitNetDataModule, ValidationOrder
from bitnet_lit.data.shards import open_shards


def batches(shards, count, *, world_size=1, batch_size=8, num_workers=0, resumed=None, stop=False):
    """The first `count` batches of all ranks, in the order they are consumed."""
    loaders = []
    for rank in range(world_size):
        config = DataConfig(dir=str(shards), batch_size=batch_size, num_workers=num_workers)
        module = BitNetDataModule(config, open_corpora(config), 16, batch_size * world_size, None, seed=3)
        module.trainer = SimpleNamespace(
            global_rank=rank,
            world_size=world_size,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            global_step=0,
            should_stop=stop,
        )
        if resumed:
            module.load_state_dict(resumed)
        loaders.append(iter(module.train_dataloader()))
    return torch.cat([torch.cat([next(loader) for loader in loaders]) for _ in range(count)])


def test_ranks_and_workers_do_not_change_the_order(shards):
    expected = batches(shards, 6)
    assert expected.shape == (48, 17)
    assert torch.equal(batches(shards, 6, world_size=2, batch_size=4), expected)
    assert torch.equal(batches(shards, 12, world_size=4, batch_size=1), expected)
    assert torch.equal(batches(shards, 6, num_workers=2), expected)


def test_resuming_goes_on_behind_the_last_sample(shards):
    expected = batches(shards, 6)
    resumed = {"consumed_samples": 16, "step": 2}
    assert torch.equal(batches(shards, 4, resumed=resumed), expected[16:])
    assert torch.equal(batches(shards, 4, resumed=resumed, world_size=2, batch_size=4), expected[16:])


def test_validation_covers_every_sequence_once_over_ranks(shards):
    config = DataConfig(dir=str(shards), batch_size=5)
    split = open_shards(shards).validation(16)
    seen = []
    for rank in range(3):
        module = BitNetDataModule(config, open_corpora(config), 16, 15, 2, seed=3)
        module.trainer = SimpleNamespace(
            global_rank=rank,
            world_size=3,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            should_stop=True,  # at its end
        )
        loader = list(module.val_dataloader())
        assert len(loader) == -(-split.num_sequences // 15)  # the same for every rank
        seen += [ids[:valid] for ids, valid, *_ in loader]
        module.trainer.should_stop = False
        part = list(module.val_dataloader())  # inside the run: the limit, and the same batches are marked at the end
        assert all(torch.equal(a[0], b[0]) for a, b in zip(part, (each for each in loader if each[3]), strict=True))
        assert len(part) == 2 and torch.equal(part[1][0], loader[len(loader) // 2][0])
    assert sum(len(ids) for ids in seen) == split.num_sequences


@pytest.mark.parametrize(
    ("limit", "parts"),
    [
        (4, [[0, 2, 5, 7], [0, 1, 2]]),  # of 10 batches and of 3
        (0.5, [[0, 2, 4, 6, 8], [0]]),
        (0.01, [[0], [0]]),
        (100, [list(range(10)), list(range(3))]),
        (None, [list(range(10)), list(range(3))]),
    ],
)
def test_each_validation_takes_the_same_part_spread_over_each_corpus(limit, parts):
    trainer = SimpleNamespace(should_stop=False)
    order = ValidationOrder([10, 3], limit, trainer)
    expected = [(corpus, batch) for corpus, part in enumerate(parts) for batch in part]
    assert list(order) == [(*batch, True) for batch in expected]
    trainer.should_stop = True  # at the end of the run
    every = [(corpus, batch) for corpus, total in enumerate((10, 3)) for batch in range(total)]
    assert list(order) == [(*batch, batch in expected) for batch in every]


def test_a_padded_validation_has_one_shape_and_the_same_sequences(shards):
    split = open_shards(shards).validation(16)
    counted = []
    for rank in range(3):
        plain, padded = (ValidationBatches([split], 7, rank, 3, is_padded) for is_padded in (False, True))
        for number in range(plain.num_batches()[0]):
            (ids, valid, *_), (more, also_valid, *_) = plain[0, number, True], padded[0, number, True]
            assert also_valid == valid and np.array_equal(more[:valid], ids[:valid]) and more.shape == (7, 17)
            counted.append(valid)
    assert sum(counted) == split.num_sequences and min(counted) < 7
