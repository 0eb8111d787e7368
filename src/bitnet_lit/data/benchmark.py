"""`bench suite=data` measures how fast text becomes tokens and tokens become batches, beside what they replace.

Each row is the work of one core. It is divided by seconds of CPU and not of the clock: what is read lies in the
system's memory, so nothing waits, and other programs on the machine change the figures less.
"""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bitnet_lit.config import BenchConfig
from bitnet_lit.data.batches import TrainBatches
from bitnet_lit.data.order import SampleOrder, ShardOrder
from bitnet_lit.data.shard_folder import find_shards, shard_path
from bitnet_lit.data.shards import open_shards
from bitnet_lit.data.sources.demo import demo_stories
from bitnet_lit.data.tokenizers.fast_encoder import FastEncoder
from bitnet_lit.data.tokenizers.train_sentencepiece import TRAINED_NAME, train_tokenizer

NUM_STORIES = 20_000  # about 9 MB of text
# TinyStories comes in fifty shards, which together are larger than a cache.
NUM_SHARDS, TOKENS_PER_SHARD = 50, 1_000_000
SPARSE_SHARD_TOKENS = 2**25  # 64 MiB, as prepare writes of about 120 MB of text
BATCH, LENGTH = 128, 256


def _interleaved(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Return the medians of two rates, measured in turns, so that a machine that slows down slows both."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)


def _row(shape: str, what: str, ours: float, peer: str, theirs: float, unit: str) -> dict[str, Any]:
    return {
        "shape": shape,
        "what": what,
        "ours": round(ours, 2),
        "peer": peer,
        "theirs": round(theirs, 2),
        "unit": unit,
        "ratio": round(ours / theirs, 2),
    }


def encoding_row(folder: Path, rounds: int) -> dict[str, Any]:
    """Measure encoding by words against SentencePiece on whole texts; each round begins with an empty cache."""
    tokenizer = train_tokenizer(demo_stories(2000), 1024, folder / TRAINED_NAME)
    stories = list(demo_stories(NUM_STORIES, seed=1))
    megabytes = sum(len(story.encode()) for story in stories) / 1e6

    def rate(encode: Callable[[str], object]) -> float:
        start = time.process_time()
        for story in stories:
            encode(story)
        return megabytes / (time.process_time() - start)

    ours, theirs = _interleaved(
        lambda: rate(tokenizer.shard_encoder(np.dtype(np.uint16))),
        lambda: rate(tokenizer.processor.encode),
        rounds,
    )
    return _row(f"{megabytes:.0f} MB of demo stories", "encode, one core", ours, "sentencepiece", theirs, "MB/s")


def warm_encoding_row(folder: Path, rounds: int) -> dict[str, Any]:
    """Measure encoding once most words were met, in C++ where there is a compiler, against the same in Python."""
    tokenizer = train_tokenizer(demo_stories(2000), 1024, folder / "warm.model")
    stories = list(demo_stories(NUM_STORIES, seed=1))
    megabytes = sum(len(story.encode()) for story in stories) / 1e6
    in_cpp, in_python = (FastEncoder(tokenizer.processor, np.dtype(np.uint16), native_from=None) for _ in range(2))
    has_compiler, bos = in_cpp.use_native(), np.array([tokenizer.bos_id], np.uint16).tobytes()

    def rate(encoder: FastEncoder) -> float:
        start = time.process_time()
        for first in range(0, len(stories), 128):
            encoder.many(stories[first : first + 128], bos)
        return megabytes / (time.process_time() - start)

    for encoder in (in_cpp, in_python):
        rate(encoder)
    ours, theirs = _interleaved(lambda: rate(in_cpp), lambda: rate(in_python), rounds)
    what = f"encode, words known, one core{'' if has_compiler else ', no compiler'}"
    return _row(f"{megabytes:.0f} MB of demo stories", what, ours, "the same in Python", theirs, "MB/s")


def _sparse_corpus(folder: Path, tokens: int) -> Path:
    """Write a folder of shards of 2^25 tokens that take no room on the disk: all ids are 0."""
    folder.mkdir()
    for number in range(max(2, -(-tokens // SPARSE_SHARD_TOKENS))):
        size = min(SPARSE_SHARD_TOKENS, max(tokens - number * SPARSE_SHARD_TOKENS, tokens // 2))
        with shard_path(folder, f"data{number:03d}").open("wb") as file:
            file.truncate(2 * size)
    return folder


def scale_rows(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Measure batches and memory of larger and larger corpora against the smallest one, in both orders."""
    sizes = [10**7, 10**8, 10**9, 10**10]
    splits = [open_shards(_sparse_corpus(folder / f"{size}", size)).train(LENGTH) for size in sizes]
    rows = []
    for shuffle in ("global", "shards"):

        def dataset(number: int, shuffle: str = shuffle) -> TrainBatches:
            split = splits[number]
            if shuffle == "global":
                return TrainBatches(split, SampleOrder(split.num_sequences, 0), BATCH)
            return TrainBatches(split, ShardOrder([piece.num_sequences for piece in split.pieces], 0, 16), BATCH)

        def rate(batches: TrainBatches) -> float:
            start = time.process_time()
            for batch in range(128):  # two blocks of ORDER_BLOCK samples
                batches[batch * BATCH]
            return 128 * BATCH * LENGTH / (time.process_time() - start) / 1e6

        datasets = [dataset(number) for number in range(len(sizes))]
        for number, size in enumerate(sizes[1:], 1):
            ours, theirs = _interleaved(partial(rate, datasets[number]), partial(rate, datasets[0]), rounds)
            shape = f"{size // 10**6:,} M tokens, {shuffle}"
            rows.append(_row(shape, "loader, one core", ours, "10 M tokens", theirs, "M tokens/s"))
        peaks = []
        for number in (-1, 0):
            tracemalloc.start()
            measured = dataset(number)
            measured[0]
            peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
            tracemalloc.stop()
        shape = f"{sizes[-1] // 10**6:,} M tokens, {shuffle}"
        rows.append(_row(shape, "loader's memory", peaks[0], "10 M tokens", peaks[1], "MiB"))
    return rows


def loader_row(folder: Path, rounds: int) -> dict[str, Any]:
    """Measure batches in shuffled order over all shards against llama2.c's `PretokDataset`, on one core.

    `PretokDataset` shuffles inside a shard, reads one shard after the other, and copies one sequence at a time.
    """
    generator = np.random.default_rng(0)
    for number in range(NUM_SHARDS):
        generator.integers(0, 2048, TOKENS_PER_SHARD, dtype=np.uint16).tofile(shard_path(folder, f"data{number:02d}"))
    split = open_shards(folder).train(LENGTH)
    dataset = TrainBatches(split, SampleOrder(split.num_sequences, 0), BATCH)
    memory_maps = [np.memmap(path, dtype=np.uint16, mode="r") for path in find_shards(folder)[1:]]
    shuffled = generator.permutation(TOKENS_PER_SHARD // LENGTH - 1)
    batches_per_shard = len(shuffled) // BATCH
    batches = 128  # two blocks of ORDER_BLOCK samples

    def ours() -> float:
        start = time.process_time()
        for batch in range(batches):
            dataset[batch * BATCH]
        return batches * BATCH * LENGTH / (time.process_time() - start)

    def theirs() -> float:
        start = time.process_time()
        for batch in range(batches):
            pairs = []
            shard, place = divmod(batch, batches_per_shard)
            memory_map = memory_maps[shard]
            for index in shuffled[place * BATCH : (place + 1) * BATCH].tolist():
                chunk = torch.from_numpy(memory_map[index * LENGTH : index * LENGTH + LENGTH + 1].astype(np.int64))
                pairs.append((chunk[:-1], chunk[1:]))
            torch.utils.data.default_collate(pairs)
        return batches * BATCH * LENGTH / (time.process_time() - start)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours_median, theirs_median = _interleaved(ours, theirs, rounds)
    finally:
        torch.set_num_threads(threads)
    return _row(
        f"{BATCH} x {LENGTH}, {NUM_SHARDS} shards",
        "loader, one core",
        ours_median / 1e6,
        "llama2.c's, a sequence at a time",
        theirs_median / 1e6,
        "M tokens/s",
    )


def data_rows(config: BenchConfig) -> list[dict[str, Any]]:
    """Measure all rows of `bench suite=data`."""
    with tempfile.TemporaryDirectory() as encoding, tempfile.TemporaryDirectory() as loading:
        return [
            encoding_row(Path(encoding), config.rounds),
            warm_encoding_row(Path(encoding), config.rounds),
            loader_row(Path(loading), config.rounds),
            *scale_rows(Path(loading), config.rounds),
        ]
