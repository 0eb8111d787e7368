"""Files of shards are opened here by path or URL, for reading at any place: local ones, and those in the cache."""

from __future__ import annotations

import os
import queue
import resource
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bitnet_lit.data.shard_cache import RemoteShard, ShardCache

MAX_OPEN_FILES = 4096
READ_AHEAD_THREADS = 4  # shards that are fetched side by side: one connection rarely fills a line


class ShardFiles(ABC):
    """Gives descriptors of shards. An object that was sent to another process opens files there."""

    @abstractmethod
    def __getitem__(self, shard: Path | str) -> int:
        """Return a descriptor, which is open until `release`.

        Raises:
            OSError: the file cannot be opened.
            DataError: it cannot be fetched.
        """

    @abstractmethod
    def release(self) -> None:
        """Say that a batch has been read."""

    @abstractmethod
    def expect(self, shards: Collection[Path | str]) -> None:
        """Say which shards will be read next, in this order, in place of those that were expected before."""


class LocalFiles(ShardFiles):
    """Opens files by path and keeps those used last open, as many as the process may hold."""

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(soft // 2, MAX_OPEN_FILES))
        self._open: OrderedDict[Path | str, int] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalFiles, ()

    def __getitem__(self, shard: Path | str) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= self._limit:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(shard, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return self._open[shard]

    def release(self) -> None:
        """Keep the files open for the next batch."""

    def expect(self, shards: Collection[Path | str]) -> None:
        """Do nothing: the system reads ahead by itself."""

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class CachedFiles(ShardFiles):
    """Opens shards of a remote folder in the cache, and fetches those that are expected in threads.

    Files are closed after each batch. The cache may have removed one meanwhile, and its room is free only then.

    Args:
        shards: by URL.
    """

    def __init__(self, cache: ShardCache, shards: Mapping[str, RemoteShard]) -> None:
        self._cache, self._shards = cache, shards
        self._open: dict[Path | str, int] = {}
        self._expected: tuple[Path | str, ...] = ()
        self._waiting: queue.SimpleQueue[Path | str] = queue.SimpleQueue()

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedFiles, (self._cache, self._shards)

    def __getitem__(self, shard: Path | str) -> int:
        if shard not in self._open:
            self._open[shard] = self._cache.open(self._shards[str(shard)])
        return self._open[shard]

    def release(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def expect(self, shards: Collection[Path | str]) -> None:
        """Fetch the shards that are not in the cache, in threads."""
        if tuple(shards) == self._expected:
            return
        self._expected = tuple(shards)
        self._waiting = queue.SimpleQueue()  # the threads of the old one end when that is empty
        for shard in shards:
            self._waiting.put(shard)
        for _ in range(min(READ_AHEAD_THREADS, len(shards))):
            # Not an executor, which would keep the process alive until all shards have come.
            threading.Thread(target=self._fetch, args=(self._waiting,), name="bitnet_lit shards", daemon=True).start()

    def _fetch(self, waiting: queue.SimpleQueue[Path | str]) -> None:
        try:
            while waiting is self._waiting:
                os.close(self._cache.open(self._shards[str(waiting.get_nowait())]))
        except Exception:  # the queue is empty, or a shard does not come: whoever reads it then learns why
            return

    def __del__(self) -> None:
        self.release()
