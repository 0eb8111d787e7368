"""Shards of a remote folder are kept here, on this machine's disk, up to a limit.

    ~/.cache/bitnet_lit/shards/
      <sha256>.bin      a whole shard, named by its content: no other shard can take its place
      lock-00 ...       held while a shard is fetched, so that the ranks of a machine fetch it once
      folders/          the meta.json of each remote folder, as it was last seen, named by the hash of its URL
      tokenizers/       the files of their tokenizers, named by their content

A shard gets its name when all of its bytes have come and their hash is right. So whatever lies there can be trusted,
whoever was killed. When room is needed, the shards that were used least recently go. A process that reads one keeps it
open meanwhile, and the system keeps the content of an open file: nobody's read fails.

The limit holds for the folder, whichever runs use it. A shard that is being fetched counts with what has come of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bitnet_lit.data.fetch import fetch
from bitnet_lit.data.fetch_errors import Damaged
from bitnet_lit.errors import UserError, disk_errors
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.files.locks import lock
from bitnet_lit.files.temporary_paths import remove_leftovers

DEFAULT_GIB = 20.0
_NUM_LOCKS = 64
_BLOCK_BYTES = 2**20


def default_cache_folder() -> Path:
    """Return the folder of shards in the user's cache. A relative XDG_CACHE_HOME counts as none, as its rules say.

    Raises:
        UserError: the user has no home folder, as in a container that is started with an unknown user.
    """
    cached, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    if os.path.isabs(cached):
        return Path(cached) / "bitnet_lit" / "shards"
    if os.path.isabs(home):
        return Path(home) / ".cache" / "bitnet_lit" / "shards"
    raise UserError("data.cache_dir: this user has no home folder to keep remote shards in: give data.cache_dir")


@dataclass(frozen=True)
class RemoteShard:
    """Describes a shard as the meta.json of its folder does.

    Attributes:
        size: in bytes.
        sha256: of its content, in hex.
    """

    url: str
    size: int
    sha256: str

    def check(self, path: Path) -> None:
        """Compare a file with the description.

        Raises:
            Damaged: it has another size or content.
        """
        if (size := path.stat().st_size) != self.size:
            raise Damaged(f"{size} bytes came of {self.size}")
        if file_sha256(path) != self.sha256:
            raise Damaged("its content is not the one that meta.json describes (the sha256 differs)")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class ShardCache:
    """Keeps shards in a folder.

    Args:
        folder: made where it is missing; None for the folder in the user's cache.
        limit: the most bytes of all shards together.
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        self._folder, self.limit = folder, limit

    @property
    def folder(self) -> Path:
        """The folder. It is first asked for where a shard is remote: a user without a home folder needs none before."""
        return default_cache_folder() if self._folder is None else self._folder

    @classmethod
    def default(cls, folder: str | None = None, gib: float = DEFAULT_GIB) -> ShardCache:
        """Return the cache that the keys data.cache_dir and data.cache_gib mean."""
        return cls(None if folder is None else Path(folder), int(gib * 2**30))

    def open(self, shard: RemoteShard) -> int:
        """Return a descriptor of a whole shard; fetch the shard if it is not there.

        Raises:
            DataError: it cannot be fetched; one line.
            UserError: the cache cannot be written, or its disk is full; one line.
        """
        path = self.folder / f"{shard.sha256}.bin"
        if (descriptor := _opened(path, shard.size)) is not None:
            return descriptor
        full = "make room, or give a smaller data.cache_gib"
        with disk_errors(f"data.cache_dir={self.folder}", full, "choose another data.cache_dir or XDG_CACHE_HOME"):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(shard.sha256):
                if (descriptor := _opened(path, shard.size)) is not None:  # another process has fetched it meanwhile
                    return descriptor
                self._make_room(shard.size)
                with atomic_file(path) as temporary:
                    fetch(shard.url, temporary, shard.check)
                    # Opened before it has its name, under which another process could remove it.
                    return os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)

    def holds(self, shard: RemoteShard) -> bool:
        """Return whether a shard is there."""
        with contextlib.suppress(OSError):
            return os.stat(self.folder / f"{shard.sha256}.bin").st_size == shard.size
        return False

    @contextlib.contextmanager
    def _locked(self, sha256: str) -> Iterator[None]:
        descriptor = os.open(self.folder / f"lock-{int(sha256[:8], 16) % _NUM_LOCKS:02d}", os.O_RDWR | os.O_CREAT)
        try:
            lock(descriptor, wait=True)  # on a disk without locks, two processes may fetch a shard twice
            yield
        finally:
            os.close(descriptor)

    def _make_room(self, size: int) -> None:
        """Remove the shards used least recently, until `size` more bytes fit, and what killed processes left behind."""
        remove_leftovers(self.folder, "*.bin")
        found = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        used = sum(each for _, each, _ in found)
        for _, bytes_freed, path in sorted(each for each in found if each[2].endswith(".bin")):
            if used + size <= self.limit:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= bytes_freed


def _opened(path: Path, size: int) -> int | None:
    """Return a descriptor of a shard, and note that it was used; None where it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(descriptor).st_size != size:  # somebody else changed it
        os.close(descriptor)
        return None
    with contextlib.suppress(OSError):  # a cache that this user may only read
        os.utime(descriptor)
    return descriptor
