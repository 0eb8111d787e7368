"""A folder of shards behind a URL is opened here; its shards come to this machine's cache when they are read.

Nothing is listed, so any web server will do. The folder is copied as `prepare` wrote it, and its meta.json says which
shards there are, how long each is, and the sha256 of its content. A shard that differs is never read: it is fetched
again, and in the end an error says so. A folder that is prepared again while a run reads it ends the run.

The cache keeps the meta.json, too. Whoever knows which shards it wants, by their digests, can read them there when the
server is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_lit.data.fetch import NotThere, fetch, joined, shown
from bitnet_lit.data.fetch_errors import Damaged
from bitnet_lit.data.shard_cache import RemoteShard, ShardCache, file_sha256
from bitnet_lit.data.shard_directory import ShardDirectory, agreed_vocab_size
from bitnet_lit.data.shard_files import ShardFiles
from bitnet_lit.data.shard_folder import MAX_META_BYTES, META_NAME, parse_meta
from bitnet_lit.data.tokenizers import Tokenizer, find_tokenizer, open_tokenizer
from bitnet_lit.data.tokenizers.sentencepiece import SentencePieceTokenizer
from bitnet_lit.data.tokenizers.tokenizer_json import JsonTokenizer
from bitnet_lit.errors import DataError, UserError, disk_errors
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.terminal import console

_TOKENIZER_NAMES = {*SentencePieceTokenizer.file_names, *JsonTokenizer.file_names}
Known = Callable[[], Collection[dict[str, str]]]
_ADD = "run the same python -m bitnet_lit.prepare again, which adds it, and copy the new meta.json there"


@dataclass
class RemoteDirectory(ShardDirectory):
    """Describes a folder of shards behind a URL.

    Attributes:
        cache: keeps the shards on this machine.
        shards: by the URL that messages show.
    """

    cache: ShardCache = field(kw_only=True)
    shards: dict[str, RemoteShard] = field(kw_only=True)

    def digests(self) -> dict[str, str]:
        """Return what identifies each shard, as a local folder of the same shards does: meta.json has noted it."""
        return _digests(self.meta)

    def files(self) -> ShardFiles:
        """Return what opens the shards of a split in the cache."""
        return ShardFiles(self.shards, self.cache)


def open_remote(
    url: str, tokenizer: Path | None, key: str, cache: ShardCache, known: Known | None = None
) -> RemoteDirectory:
    """Open a folder of shards behind a URL.

    Args:
        tokenizer: the tokenizer's file, in place of the folder's own.
        key: the key of the command that names the folder, for errors.
        known: returns the `digests` of folders that may be read from the cache alone where the server cannot be
            reached. The validation shard must be there. None: the server must answer.

    Raises:
        UserError: there is no folder that `prepare` finished, or the tokenizer is not the one that wrote it; one line.
        DataError: it cannot be reached; one line.
    """
    where = f"{key}={shown(url)}"
    meta = _meta(url, where, cache, known)
    if not meta.get("complete", True):
        raise UserError(f"{where}: not finished: prepare it to its end, and copy it again")
    entries = meta.get("shards", {})
    if not entries:
        raise UserError(f"{where}: its {META_NAME} names no shards: copy a folder there that prepare wrote")
    if lacking := [name for name, entry in entries.items() if not {"sha256", "digest"} <= entry.keys()]:
        raise UserError(f"{where}: its {META_NAME} has no sha256 of {min(lacking)}: {_ADD}")
    _keep(url, meta, cache)
    opened = open_tokenizer(tokenizer) if tokenizer else _fetch_tokenizer(url, meta, where, cache)
    vocab_size = agreed_vocab_size(shown(url), None, meta, opened)
    shards = _shards(url, meta)
    sizes: dict[Path | str, int] = {joined(shown(url), name): entries[name]["tokens"] for name in sorted(entries)}
    return RemoteDirectory(
        shown(url), sizes, np.dtype(meta["dtype"]), vocab_size, opened, meta, cache=cache, shards=shards
    )


def _meta(url: str, where: str, cache: ShardCache, known: Known | None) -> dict[str, Any]:
    """Return the meta.json of a remote folder, or the one that was kept, where the server cannot be reached."""
    kept = _kept(url, cache) if known else None
    if known and kept:
        try:
            return _fetch_meta(url, attempts=1)
        except DataError:
            if _is_known(kept, known):
                note = f"{where}: cannot be reached: the same shards are read from data.cache_dir={cache.folder}"
                console(stderr=True).print(note, markup=False)
                return kept
    try:
        return _fetch_meta(url, attempts=None)
    except NotThere as error:
        raise UserError(
            f"{where}: cannot be opened ({error}): a remote folder is read by the {META_NAME} that prepare writes"
        ) from None


def _is_known(meta: dict[str, Any], known: Known) -> bool:
    with contextlib.suppress(
        OSError, UserError, LookupError
    ):  # the checkpoint that knows the digests is damaged or gone
        return _digests(meta) in known()
    return False


def _shards(url: str, meta: dict[str, Any]) -> dict[str, RemoteShard]:
    """Return the shards that a meta.json describes, by the URL that messages show, in order."""
    itemsize = np.dtype(meta["dtype"]).itemsize
    return {
        joined(shown(url), name): RemoteShard(joined(url, name), entry["tokens"] * itemsize, entry["sha256"])
        for name, entry in sorted(meta["shards"].items())
    }


def _digests(meta: dict[str, Any]) -> dict[str, str]:
    """Return what identifies each shard, by its name."""
    return {name: entry["digest"] for name, entry in sorted(meta["shards"].items())}


def _kept_path(url: str, cache: ShardCache) -> Path:
    """Return where the meta.json of a remote folder is kept. A signature, which is in the query, may change."""
    return cache.folder / "folders" / f"{hashlib.sha256(shown(url).rstrip('/').encode()).hexdigest()}.json"


def _keep(url: str, meta: dict[str, Any], cache: ShardCache) -> None:
    """Keep the meta.json of a remote folder beside its shards, for the day when its server is gone."""
    path, content = _kept_path(url, cache), json.dumps(meta).encode()
    # It may fail where a cache may only be read, and nothing needs it now: a full disk is reported by the shards.
    with contextlib.suppress(OSError, UserError):
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                temporary.write_bytes(content)


def _kept(url: str, cache: ShardCache) -> dict[str, Any] | None:
    """Return the meta.json that was kept, if the cache has its validation shard."""
    with contextlib.suppress(OSError, UserError, LookupError):  # a file that is damaged is none
        path = _kept_path(url, cache)
        meta = parse_meta(path.read_bytes(), path, "")
        shards = list(_shards(url, meta).values())  # of an unfinished folder there are none
        if shards and cache.holds(shards[0]):
            return meta
    return None


def _fetch_meta(url: str, attempts: int | None) -> dict[str, Any]:
    """Return the meta.json of a remote folder. Half of one is asked for again, as a shard is."""
    address = joined(url, META_NAME)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / META_NAME
        path.touch()
        remedy = "copy the folder there again"
        read: list[dict[str, Any]] = []

        def check(path: Path) -> None:
            if path.stat().st_size > MAX_META_BYTES:
                raise Damaged(f"more than {MAX_META_BYTES} bytes")
            content = path.read_bytes().strip()
            try:
                read.append(parse_meta(content, META_NAME, remedy))
            except UserError as error:
                if content.startswith(b"{") and not content.endswith(b"}"):
                    raise Damaged(str(error)) from None  # a part of it
                raise NotThere(f"{shown(address)}: {error}: check the URL") from None

        fetch(address, path, check, is_first=True, attempts=attempts)
    return read[-1]


def _fetch_tokenizer(url: str, meta: dict[str, Any], where: str, cache: ShardCache) -> Tokenizer | None:
    """Open the tokenizer of a remote folder. Its files are kept beside the shards of the cache, by their content."""
    files = meta.get("tokenizer_files")
    if files is None:
        if meta.get("tokenizer_sha256") is None:
            return None
        raise UserError(f"{where}: its {META_NAME} has no sha256 of the tokenizer's files: {_ADD}")
    if unknown := set(files) - _TOKENIZER_NAMES:
        raise UserError(f"{where}: its {META_NAME} names {min(unknown)!r} as a tokenizer's file: give data.tokenizer")
    content = hashlib.sha256("".join(f"{name}={files[name]}\n" for name in sorted(files)).encode()).hexdigest()
    folder = cache.folder / "tokenizers" / content
    with disk_errors(f"data.cache_dir={cache.folder}", refused="choose another data.cache_dir or XDG_CACHE_HOME"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, sha256 in files.items():

            def check(path: Path, sha256: str = sha256, name: str = name) -> None:
                if file_sha256(path) != sha256:
                    raise Damaged(f"its content is not the one that {META_NAME} describes (the sha256 differs)")

            path = folder / name
            if not os.path.isfile(path) or file_sha256(path) != sha256:
                with atomic_file(path) as temporary:
                    fetch(joined(url, name), temporary, check)
    found = find_tokenizer(folder)
    return open_tokenizer(found) if found else None
