"""Shards are written by this process, or by several where there are several shards to write.

A worker process encodes whole shards, so the processes share nothing but the tokenizer's file. A worker ends with its
parent, however that ends: a worker that waited for work for ever would keep the terminal's output open. It also ends
when the command is stopped or has met an error, because a shard takes many seconds. The next call writes it again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bitnet_lit.control_groups import processors
from bitnet_lit.data.processes import without_main_script
from bitnet_lit.data.shard_cache import file_sha256
from bitnet_lit.data.shard_folder import dtype_for, shard_digest, shard_path
from bitnet_lit.data.sources.source import Continuation, ReadCounts, TextShard, fingerprint
from bitnet_lit.data.tokenizers import TextEncoder, Tokenizer, open_tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.files.temporary_paths import remove_leftovers
from bitnet_lit.terminal import console

GROUP_CHARACTERS = 2**16  # of stories that are encoded in one call: they fit a core's own cache

# In a worker process: the tokenizer's file, and the encoder, whose cache of words lasts from shard to shard.
_tokenizer_path: Path | None = None
_encoder: ShardEncoder | None = None


def _start_worker(tokenizer_path: Path, pipe: Connection) -> None:
    """Prepare a new worker process.

    Args:
        pipe: its other end is closed when the worker has to end.
    """
    global _tokenizer_path
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    _tokenizer_path = tokenizer_path


def _end_with(pipe: Connection) -> None:
    """Wait until the parent process closes its end of the pipe, or ends by whatever cause, and end then."""
    with contextlib.suppress(OSError):
        pipe.poll(None)
    os._exit(1)


class ShardEncoder:
    """Turns a story into its bytes in a shard: BOS and its tokens.

    Attributes:
        dtype: how token ids are stored.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.dtype = dtype_for(tokenizer.vocab_size)
        self._bos = np.array([tokenizer.bos_id], self.dtype).tobytes()
        encode = tokenizer.shard_encoder(self.dtype)
        self._encode = encode if isinstance(encode, TextEncoder) else TextEncoder(encode)
        # SentencePiece puts a space in front of each text; a byte-level tokenizer does not.
        parts, whole = [self._encode("ab"), self._encode(" ab")], self._encode("ab ab")
        self._keeps_space = parts[0] + parts[1] == whole != parts[0] * 2

    def __call__(self, story: str) -> bytes:
        """Return the bytes of a story. A `Continuation` has no BOS, and its tokens are those behind the text before."""
        if isinstance(story, Continuation):
            return self._encode(story if self._keeps_space else story[1:])
        return self._bos + self._encode(story)

    def many(self, stories: Sequence[str]) -> bytes:
        """Return the bytes of several stories."""
        if any(isinstance(story, Continuation) for story in stories):
            return b"".join(map(self, stories))
        return self._encode.many(stories, self._bos)


def _write_in_worker(text: TextShard, folder: Path) -> dict[str, Any]:
    global _encoder
    assert _tokenizer_path is not None
    if _encoder is None:  # not in _start_worker, whose errors the parent does not see
        _encoder = ShardEncoder(open_tokenizer(_tokenizer_path))
    return write_shard(text, folder, _encoder)


def write_shard(text: TextShard, folder: Path, encoder: ShardEncoder) -> dict[str, Any]:
    """Encode one shard and write it; return its entry in meta.json.

    Raises:
        UserError: there is no text in it, or the text cannot be read or changed while it was read.
    """
    before = fingerprint([text])
    counts = ReadCounts()
    stories = text_bytes = 0
    path = shard_path(folder, text.name)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for segment in text.segments:
            for together in _grouped(segment.stories(counts)):
                file.write(encoder.many(together))
                stories += sum(not isinstance(story, Continuation) for story in together)
                text_bytes += sum(len(story) if story.isascii() else len(story.encode()) for story in together)
        tokens = file.tell() // encoder.dtype.itemsize
        if not tokens:
            raise UserError(f"{text.segments[0]}: no text in it: take the file away, or give another source")
        if fingerprint([text]) != before:
            raise UserError(f"{text.segments[0]}: it, or a file read with it, changed meanwhile: try again")
    entry = {"tokens": tokens, "stories": stories, "text_bytes": text_bytes, "fingerprint": before, **asdict(counts)}
    return entry | {"sha256": file_sha256(path), "digest": shard_digest(path)}


def _grouped(stories: Iterable[str]) -> Iterator[list[str]]:
    """Yield stories in groups of about GROUP_CHARACTERS."""
    group: list[str] = []
    size = 0
    for story in stories:
        group.append(story)
        size += len(story)
        if size >= GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def write_shards(
    texts: Sequence[TextShard],
    todo: Sequence[TextShard],
    folder: Path,
    tokenizer: Tokenizer,
    num_workers: int | None,
    done: Callable[[TextShard, dict[str, Any]], None],
) -> None:
    """Write the shards in `todo`.

    Args:
        texts: all shards of the folder, for the progress bar.
        num_workers: the most processes to use. None: one for each processor that this process may use.
        done: called in this process with each shard that has been written and its entry in meta.json.

    Raises:
        UserError: the text cannot be read, or a worker process was killed; shards that are written stay.
    """
    workers = min(num_workers or processors(), len(todo))
    columns = (TextColumn("encoding"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    terminal = console(stderr=True)
    with Progress(*columns, console=terminal, disable=not todo or not terminal.is_terminal) as progress:
        task = progress.add_task("encode", total=sum(text.size for text in texts))
        progress.advance(task, sum(text.size for text in texts) - sum(text.size for text in todo))

        def note(text: TextShard, entry: dict[str, Any]) -> None:
            done(text, entry)
            progress.advance(task, text.size)

        if workers <= 1:
            encoder = ShardEncoder(tokenizer)
            for text in todo:
                note(text, write_shard(text, folder, encoder))
            return
        assert tokenizer.path is not None  # each process opens the tokenizer from its file
        context = multiprocessing.get_context("spawn")  # fork copies locks that other threads hold
        theirs, ours = context.Pipe(duplex=False)
        with ours, theirs, ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path, theirs)) as pool:
            try:
                with without_main_script():
                    futures = {pool.submit(_write_in_worker, text, folder): text for text in todo}
                for future in as_completed(futures):
                    note(futures[future], future.result())
            except (BrokenProcessPool, BlockingIOError) as error:  # killed, or not even started
                happened = (
                    "was killed, most likely for memory" if isinstance(error, BrokenProcessPool) else "is refused"
                )
                raise UserError(f"num_workers={workers}: an encoding process {happened}: take fewer") from None
            except BaseException:
                ours.close()  # a shard takes many seconds, and a user who stops the command waits for its end
                pool.shutdown(cancel_futures=True)
                remove_leftovers(folder, *(shard_path(folder, text.name).name for text in todo))
                raise
