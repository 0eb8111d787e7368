"""`prepare` turns text into llama2.c's shards; the command `python -m bitnet_lit.prepare` calls it.

The bytes are those of llama2.c's `tinystories.py pretokenize`: for each story a BOS and its tokens. A shard appears
under its name when it is whole, and meta.json lists it then. An interrupted call therefore leaves whole shards, and the
same call again writes the others. A folder belongs to one text and one tokenizer; a call with others is refused.

What was read and what was written is printed, and what is passed over is named, so that no text is left out in silence.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.exclusive_folder import exclusive_folder
from bitnet_lit.data.shard_cache import file_sha256
from bitnet_lit.data.shard_folder import (
    META_NAME,
    META_VERSION,
    check_alone,
    dtype_for,
    find_shards,
    read_meta,
    shard_digest,
    shard_path,
    write_meta,
)
from bitnet_lit.data.sources import open_source
from bitnet_lit.data.sources.source import ReadCounts, Source, TextShard, fingerprint
from bitnet_lit.data.tokenizers import Tokenizer, find_tokenizer, open_tokenizer
from bitnet_lit.data.tokenizers.train_sentencepiece import TRAINED_NAME, train_tokenizer
from bitnet_lit.data.write_shards import write_shards
from bitnet_lit.errors import UserError
from bitnet_lit.terminal import console

_ELSEWHERE = "choose another out=, or delete the folder"
TOKENIZER_TEXT_CHARACTERS = 100 * 2**20  # llama2.c trains on its first ten shards; more text hardly changes the pieces
NOTE_SECONDS = 1  # between two writes of meta.json, at least


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write a folder of shards, or finish one.

    Returns:
        Figures by name. These describe the whole folder: shards, stories, tokens, text_bytes, bytes_per_token,
        vocab_size, and what was read for it: files, documents, bytes_in, empty, carriage_returns. These describe this
        call: seconds, and megabytes_per_s of encoded text.

    Raises:
        UserError: text, tokenizer or folder cannot be used. Whole shards stay; nothing half-written does.
    """
    out = config.folder
    with exclusive_folder(out):
        source = open_source(config)
        if source.passed_over:
            _say(f"{config.typed_source}: not read: {source.passed_over}")
        if source.validation:
            _say(f"{config.typed_source}: split {source.validation} is for validation (the first shard), not training")
        meta = read_meta(out, _ELSEWHERE)
        start = time.perf_counter()
        tokenizer = _folder_tokenizer(config, out, source, meta)
        todo = [text for text in source.shards if not _is_written(text, out, meta)]
        if todo or not meta.get("complete"):
            _write_missing(config, source, todo, tokenizer, meta)
        _describe_contents(out, tokenizer, meta)
    seconds = time.perf_counter() - start
    entries = meta["shards"]
    encoded_bytes = sum(entries[_file_name(text)]["text_bytes"] for text in todo)
    summary = _sums(entries) | {
        "files": len(source.files),
        "shards": len(entries),
        "vocab_size": tokenizer.vocab_size,
        "seconds": seconds,
        "megabytes_per_s": encoded_bytes / 1e6 / seconds,
    }
    _say_what_was_done(config, summary, was_complete=not todo)
    return summary


def _write_missing(
    config: PrepareConfig, source: Source, todo: list[TextShard], tokenizer: Tokenizer, meta: dict[str, Any]
) -> None:
    """Write the shards in `todo` and note them in meta.json, which says that the folder is complete at the end."""
    out, noted = config.folder, time.monotonic()

    def note(text: TextShard, entry: dict[str, Any]) -> None:
        nonlocal noted
        meta["shards"][_file_name(text)] = entry
        # Not after each of many thousand shards: the file is written as a whole. A shard that a killed call did not
        # note is written again by the next one, with the same bytes.
        if time.monotonic() - noted > NOTE_SECONDS:
            write_meta(out, meta)
            noted = time.monotonic()

    meta["complete"] = False
    write_meta(out, meta)
    try:
        write_shards(source.shards, todo, out, tokenizer, config.num_workers, note)
        meta["complete"] = True
    finally:
        write_meta(out, meta)


def _describe_contents(out: Path, tokenizer: Tokenizer, meta: dict[str, Any]) -> None:
    """Note the content of each file in meta.json, which a copy of the folder behind a URL is checked against.

    Shards that an earlier version wrote are read for it.
    """
    before = json.dumps(meta)
    for name, entry in meta["shards"].items():
        if "sha256" not in entry:
            entry |= {"sha256": file_sha256(out / name), "digest": shard_digest(out / name)}
    meta["tokenizer_files"] = _file_hashes(tokenizer, out)
    if json.dumps(meta) != before:
        with contextlib.suppress(OSError):  # a finished folder of an earlier version, which this user may only read
            write_meta(out, meta)


def _file_hashes(tokenizer: Tokenizer, out: Path) -> dict[str, str]:
    """Return the sha256 of each file of the tokenizer in `out`, by name."""
    return {name: file_sha256(out / name) for name in tokenizer.file_names if os.path.isfile(out / name)}


def _file_name(text: TextShard) -> str:
    return shard_path(Path(), text.name).name


def _is_written(text: TextShard, out: Path, meta: dict[str, Any]) -> bool:
    """Return whether the shard of a text is there, and was made from the text as it is now."""
    entry = meta["shards"].get(_file_name(text))
    path = shard_path(out, text.name)
    if entry is None or entry["fingerprint"] != fingerprint([text]) or not path.is_file():
        return False
    return path.stat().st_size == entry["tokens"] * np.dtype(meta["dtype"]).itemsize


def _folder_tokenizer(config: PrepareConfig, out: Path, source: Source, meta: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of `out`: copied, trained, or left there by an earlier call; write a new folder's meta.json.

    Raises:
        UserError: the folder belongs to another text or tokenizer.
    """
    vocab_size = config.vocab_size or source.vocab_size
    origin = {"tokenizer_origin": _tokenizer_origin(config, vocab_size, source), "source": source.identity}
    _check_folder(out, source, meta, origin)
    there = find_tokenizer(out)
    if meta and there:
        tokenizer = open_tokenizer(there)
    elif config.tokenizer:
        tokenizer = open_tokenizer(config.tokenizer)
        if there and open_tokenizer(there).sha256 != tokenizer.sha256:
            raise UserError(f"out={out}: {there.name} there is not tokenizer={config.tokenizer}: {_ELSEWHERE}")
        tokenizer.copy_to(out)
    else:
        tokenizer = _trained_tokenizer(out, source, vocab_size)
    described = {
        "format_version": META_VERSION,
        "dtype": dtype_for(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.sha256,
        **origin,
    }
    if not meta:
        meta |= {**described, "tokenizer_files": _file_hashes(tokenizer, out), "complete": False, "shards": {}}
        write_meta(out, meta)
    elif wrong := next((key for key, value in described.items() if meta.get(key) != value), None):
        raise UserError(
            f"out={out}: {META_NAME} says {wrong}={meta.get(wrong)}, its tokenizer {described[wrong]}: {_ELSEWHERE}"
        )
    return tokenizer


def _tokenizer_origin(config: PrepareConfig, vocab_size: int, source: Source) -> str:
    """Return where the tokenizer comes from: a call that says something else must not add to the folder."""
    if config.tokenizer:
        return f"copied/{open_tokenizer(config.tokenizer).sha256}"
    return f"trained/{vocab_size}/{fingerprint(source.shards)}"


def _check_folder(out: Path, source: Source, meta: dict[str, Any], origin: dict[str, str]) -> None:
    """Refuse a folder whose shards are of another text, of another tokenizer, or not written by `prepare`."""
    if not meta:
        if foreign := find_shards(out):
            raise UserError(f"out={out}: {foreign[0].name} lies there without a {META_NAME} of ours: {_ELSEWHERE}")
        check_alone(out, source.files)
        return
    if "shards" not in meta:
        raise UserError(f"out={out}: its {META_NAME} is not one that prepare wrote: {_ELSEWHERE}")
    if any(meta.get(key) != value for key, value in origin.items()):
        raise UserError(f"out={out}: holds shards of another tokenizer or source: {_ELSEWHERE}")
    if gone := set(meta["shards"]) - {_file_name(text) for text in source.shards}:
        raise UserError(f"out={out}: holds {min(gone)}, whose text is no longer in the source: {_ELSEWHERE}")


def _trained_tokenizer(out: Path, source: Source, vocab_size: int) -> Tokenizer:
    """Train the folder's tokenizer. One that lies there already must be the same, left by a call that was killed."""
    there = find_tokenizer(out)
    if there is None:
        return train_tokenizer(_training_text(source), vocab_size, out / TRAINED_NAME)
    again = out / f".tokenizer.{os.getpid()}.tmp"
    try:
        trained = train_tokenizer(_training_text(source), vocab_size, again)
    finally:
        again.unlink(missing_ok=True)
    if there.name != TRAINED_NAME or open_tokenizer(there).sha256 != trained.sha256:
        raise UserError(
            f"out={out}: {there.name} lies there without a {META_NAME} of ours: {_ELSEWHERE}, or name it: "
            f"tokenizer={there}"
        )
    return open_tokenizer(there)


def _training_text(source: Source) -> Iterator[str]:
    """Yield stories to train a tokenizer on: those of the training shards, or of the only shard."""
    size, counts = 0, ReadCounts()
    for text in source.shards[1:] or source.shards:
        for segment in text.segments:
            for story in segment.stories(counts):
                yield story
                size += len(story)
                if size > TOKENIZER_TEXT_CHARACTERS:
                    return


def _sums(entries: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Add up the entries of all shards. Entries of an earlier version do not say what was read."""
    sums: dict[str, Any] = {
        key: sum(entry.get(key, 0) for entry in entries.values())
        for key in ("stories", "tokens", "text_bytes", "empty", "carriage_returns")
    }
    for key, instead in (("documents", "stories"), ("bytes_in", "text_bytes")):
        sums[key] = sum(entry.get(key, entry[instead]) for entry in entries.values())
    sums["bytes_per_token"] = sums["text_bytes"] / max(sums["tokens"], 1)
    return sums


def _say_what_was_done(config: PrepareConfig, summary: dict[str, Any], was_complete: bool) -> None:
    if summary["files"]:
        read = f"read {_counted(summary['files'], 'file')}, {_counted(summary['documents'], 'document')}, "
        read += f"{summary['bytes_in']:,} bytes"
        if summary["empty"]:
            read += f"; {_counted(summary['empty'], 'document')} without text"
        if summary["carriage_returns"]:
            read += f"; {summary['carriage_returns']:,} documents of .json with carriage returns, kept as llama2.c does"
        _say(f"{config.typed_source}: {read}")
    speed = f"{summary['seconds']:.1f} s, {summary['megabytes_per_s']:.1f} MB/s"
    _say(
        f"{config.folder}: {_counted(summary['shards'], 'shard')}, {_counted(summary['stories'], 'document')}, "
        f"{_counted(summary['tokens'], 'token')}, vocabulary {summary['vocab_size']:,}, "
        f"{summary['bytes_per_token']:.3f} bytes a token, " + ("complete already" if was_complete else speed)
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _say(line: str) -> None:
    console(stderr=True).print(line)
