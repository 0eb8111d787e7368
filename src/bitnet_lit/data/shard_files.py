"""Files of shards are opened here for reading at any place: local ones by their path, remote ones in the cache.

`expect` says which shards come next. Remote ones are then fetched in threads, while the ones before are read. Where
they are read as a stream (data.shuffle=shards), the system is also asked to read their files into its memory: a disk
or a network mount reads a file from front to back much faster than here and there.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnet_lit.data.shard_cache import RemoteShard, ShardCache

MAX_OPEN_FILES = 4096
READ_AHEAD_THREADS = 4  # shards that are fetched side by side: one connection rarely fills a line


class ShardFiles:
    """Gives descriptors of shards. An object that was sent to another process opens the files there.

    Local files that were used last stay open, as many as the process may hold. Remote ones are closed after each batch:
    the cache may have removed one meanwhile, and its room is free only then.

    Args:
        remote: the shards of remote folders, by the URL that stands in place of a path.
        cache: keeps them.
    """

    def __init__(self, remote: Mapping[str, RemoteShard] | None = None, cache: ShardCache | None = None) -> None:
        self.remote, self.cache = remote or {}, cache
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(soft // 2, MAX_OPEN_FILES))
        self._open: OrderedDict[Path | str, int] = OrderedDict()
        self._of_batch: dict[Path | str, int] = {}
        self._expected: tuple[Path | str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardFiles, (self.remote, self.cache)

    def __getitem__(self, shard: Path | str) -> int:
        """Return a descriptor, which is open until `release`.

        Raises:
            OSError: the file cannot be opened.
            DataError: it cannot be fetched.
        """
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if shard in self._of_batch:
            return self._of_batch[shard]
        if shard in self.remote:
            return self._of_batch.setdefault(shard, self._fetched(shard))
        if len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(shard, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return self._open[shard]

    def release(self) -> None:
        """Say that a batch has been read."""
        while self._of_batch:
            os.close(self._of_batch.popitem()[1])

    def expect(self, shards: Sequence[Path | str], as_stream: bool = False) -> None:
        """Say which shards are read next, in this order, in place of those that were expected before.

        Args:
            as_stream: whether all of each shard is read soon.
        """
        if tuple(shards) == self._expected:
            return
        self._expected = tuple(shards)
        waiting: queue.SimpleQueue[Path | str] = queue.SimpleQueue()
        for shard in shards:
            if as_stream or shard in self.remote:
                waiting.put(shard)
        for _ in range(min(READ_AHEAD_THREADS, waiting.qsize())):
            # Not an executor, which would keep the process alive until all shards have come.
            arguments = (self._expected, waiting, as_stream)
            threading.Thread(target=self._read_ahead, args=arguments, name="bitnet_lit shards", daemon=True).start()

    def _read_ahead(
        self, expected: tuple[Path | str, ...], waiting: queue.SimpleQueue[Path | str], as_stream: bool
    ) -> None:
        # An error ends the thread: the queue is empty, or a shard does not come. Whoever reads that one learns why.
        with contextlib.suppress(Exception):
            while expected is self._expected:
                shard = waiting.get_nowait()
                descriptor = self._fetched(shard) if shard in self.remote else os.open(shard, os.O_RDONLY)
                try:
                    if as_stream and hasattr(os, "posix_fadvise"):  # macOS has none
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def _fetched(self, shard: Path | str) -> int:
        assert self.cache is not None
        return self.cache.open(self.remote[str(shard)])

    def __del__(self) -> None:
        self.release()
        for descriptor in self._open.values():
            os.close(descriptor)
