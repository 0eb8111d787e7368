"""Reading sequences while their files change, and with more shards than files may be open."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from bitnet_lit.data.batches import BatchLoader, ErrorsAsItems, TrainBatches
from bitnet_lit.data.order import SampleOrder
from bitnet_lit.data.shards import open_shards
from bitnet_lit.errors import DataError


def write_folder(folder, count=3, tokens=5000):
    for number in range(count):
        (np.arange(tokens, dtype=np.uint16) % 1000 + number).tofile(folder / f"data{number:02d}.bin")
    return open_shards(folder).train(10)


def truncate(path):
    os.truncate(path, 4000)


def replace_ids(path):
    with path.open("r+b") as file:
        file.write(np.full(5000, 40_000, np.uint16).tobytes())


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, r"data01.bin: ends at byte 4000, earlier than when it was opened: write the shards again"),
        (replace_ids, r"data01.bin: token id 40000 lies beyond the vocabulary of 32000"),
        (remove, r"data01.bin: cannot be read any more \(No such file"),
    ],
)
@pytest.mark.parametrize("opened_before", [False, True])
def test_a_shard_that_changes_while_it_is_read_is_named(tmp_path, change, message, opened_before):
    split = write_folder(tmp_path)
    everything = np.arange(split.num_sequences)
    if opened_before:
        split.gather(everything)
    change(tmp_path / "data01.bin")
    if change is remove and opened_before:
        assert split.gather(everything).shape == (998, 11)  # an open file outlives its name
        return
    with pytest.raises(DataError, match=message) as error:
        split.gather(everything)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_line_is_the_same_from_a_loaders_process(tmp_path, num_workers):
    split = write_folder(tmp_path)
    loader = BatchLoader(
        ErrorsAsItems(TrainBatches(split, SampleOrder(split.num_sequences, 0), 32)),
        sampler=list(range(0, 32 * 20, 32)),
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
    )
    batches = iter(loader)
    first = next(batches)
    assert first.shape == (32, 11) and not first.is_shared()  # a container has little shared memory
    truncate(tmp_path / "data01.bin")
    with pytest.raises(DataError) as error:
        list(batches)
    assert str(error.value).startswith(f"{tmp_path}/data01.bin: ends at byte") and "\n" not in str(error.value)


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    expected = write_folder(tmp_path, count=9).gather(np.arange(3000))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (6, 6))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    split = open_shards(tmp_path).train(10)
    indices = np.random.default_rng(0).permutation(3000)
    assert np.array_equal(split.gather(indices), expected[indices])
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before + 3
        del split
        assert len(os.listdir("/proc/self/fd")) == before


def test_no_sequences_are_no_rows(tmp_path):
    assert write_folder(tmp_path).gather(np.array([], dtype=np.int64)).shape == (0, 11)


def test_a_loaders_process_needs_no_lightning():
    code = "import sys, bitnet_lit.data.batches; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded and not {"lightning", "hydra", "wandb"} & set(loaded)


@pytest.mark.parametrize("count", [1, 499, 500, 998, 10_000])
def test_the_first_sequences_may_end_within_a_shard(tmp_path, count):
    split = write_folder(tmp_path)
    sizes = [piece.num_sequences for piece in split.pieces]
    first = split.first(count)
    assert first.num_sequences == min(count, sum(sizes)) and len(first.pieces) == (1 if count <= sizes[0] else 2)
    everything = np.arange(first.num_sequences)
    assert np.array_equal(first.gather(everything), split.gather(everything))
