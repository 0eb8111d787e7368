"""Writing shards: one after the other, or on several processes where there are several to write.

A process encodes whole shards, so nothing is shared but the tokenizer's file. It ends with its parent, however that
ends: a process that waited for work for ever would hold the terminal's output.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bitnet_lit.atomic import atomic_file
from bitnet_lit.data.corpus import ShardPlan
from bitnet_lit.data.meta import dtype_for
from bitnet_lit.data.processes import without_main_script
from bitnet_lit.data.stories import ReadCounts, read_stories
from bitnet_lit.data.tokenizers import Tokenizer, open_tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.terminal import console

# In a worker process: the tokenizer's file, and the encoder, whose cache of words lasts from shard to shard.
_tokenizer_path: Path | None = None
_encoder: ShardEncoder | None = None


def _start_worker(tokenizer_path: Path) -> None:
    global _tokenizer_path
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer_path = tokenizer_path


def _end_with_parent() -> None:
    """A worker waits for work for ever, also when the parent that would give it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class ShardEncoder:
    """The bytes that a document takes in a shard: BOS and its tokens.

    Attributes:
        dtype: of the token ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.dtype = dtype_for(tokenizer.vocab_size)
        self._bos = np.array([tokenizer.bos_id], self.dtype).tobytes()
        self._encode = tokenizer.shard_encoder(self.dtype)

    def __call__(self, document: str) -> bytes:
        return self._bos + self._encode(document)


def _write_in_worker(plan: ShardPlan, out: Path) -> dict[str, Any]:
    global _encoder
    assert _tokenizer_path is not None
    if _encoder is None:  # not when the process starts: an error there would say nothing of its cause
        _encoder = ShardEncoder(open_tokenizer(_tokenizer_path))
    return write_shard(plan, out, _encoder)


def write_shard(plan: ShardPlan, out: Path, encoder: ShardEncoder) -> dict[str, Any]:
    """Encode one shard and write it; returns its entry in meta.json.

    Raises:
        UserError: no text in it, text that cannot be read, or that changed while it was read.
    """
    before = fingerprint([plan])
    counts = ReadCounts()
    stories = text_bytes = 0
    with atomic_file(out / plan.name) as temporary, temporary.open("wb") as file:
        for segment in plan.segments:
            for story in read_stories(segment, counts):
                file.write(encoder(story))
                stories += 1
                text_bytes += len(story.encode())
        tokens = file.tell() // encoder.dtype.itemsize
        if not tokens:
            raise UserError(f"{plan.segments[0].path}: no text in it: take the file away, or give another source")
        if fingerprint([plan]) != before:
            raise UserError(f"{plan.segments[0].path}: it, or a file read with it, changed meanwhile: try again")
    of_files = all(segment.path for segment in plan.segments)
    return {
        "tokens": tokens,
        "stories": stories,
        "text_bytes": text_bytes,
        "fingerprint": before,
        "bytes_in": plan.text_bytes if of_files else text_bytes,
        **asdict(counts),
    }


def fingerprint(plans: list[ShardPlan]) -> str:
    """Changes when the text that the plans read changes; of files, their places, sizes and times."""
    parts = [segment.fingerprint() for plan in plans for segment in plan.segments]
    return hashlib.sha256(os.fsencode("\n".join(parts))).hexdigest()


def write_shards(
    plans: list[ShardPlan],
    todo: list[ShardPlan],
    out: Path,
    tokenizer: Tokenizer,
    num_workers: int | None,
    done: Callable[[ShardPlan, dict[str, Any]], None],
) -> None:
    """Write the shards in `todo`.

    Args:
        plans: all shards of the folder, for the progress bar.
        num_workers: processes at most. None: one for each core.
        done: called in this process with each shard that has been written and its entry in meta.json.

    Raises:
        UserError: text that cannot be read, or a process that was killed; shards that are written stay.
    """
    workers = min(num_workers or os.cpu_count() or 1, len(todo))
    columns = (TextColumn("encoding"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    terminal = console(stderr=True)
    with Progress(*columns, console=terminal, disable=not todo or not terminal.is_terminal) as progress:
        task = progress.add_task("encode", total=sum(plan.text_bytes for plan in plans))
        progress.advance(task, sum(plan.text_bytes for plan in plans if plan not in todo))

        def note(plan: ShardPlan, entry: dict[str, Any]) -> None:
            done(plan, entry)
            progress.advance(task, plan.text_bytes)

        if workers <= 1:
            encoder = ShardEncoder(tokenizer)
            for plan in todo:
                note(plan, write_shard(plan, out, encoder))
            return
        assert tokenizer.path is not None  # each process opens the tokenizer from its file
        context = multiprocessing.get_context("spawn")  # fork copies locks that other threads hold
        with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path,)) as pool:
            try:
                with without_main_script():
                    futures = {pool.submit(_write_in_worker, plan, out): plan for plan in todo}
                for future in as_completed(futures):
                    note(futures[future], future.result())
            except (BrokenProcessPool, BlockingIOError) as error:  # killed, or not even started
                happened = (
                    "was killed, most likely for memory" if isinstance(error, BrokenProcessPool) else "is refused"
                )
                raise UserError(f"num_workers={workers}: an encoding process {happened}: take fewer") from None
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
