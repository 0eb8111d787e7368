"""Text to llama2.c shards: what `python -m bitnet_lit.prepare` does.

The bytes are those of llama2.c's `tinystories.py pretokenize`: for each story, stripped, a BOS and its tokens. A shard
appears at once and as a whole, and `meta.json` notes it then. So an interrupted call leaves whole shards, and the same
call again writes the others. A folder belongs to one text and one tokenizer: a call with others is refused.

What was read and what was written is printed, and what of a source is passed over is named: no text goes missing
without a word.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.corpus import ShardPlan, demo_shards, file_shards
from bitnet_lit.data.download import fetch_tinystories
from bitnet_lit.data.find_text import find_text
from bitnet_lit.data.meta import META_NAME, META_VERSION, dtype_for, read_meta, write_meta
from bitnet_lit.data.output_folder import exclusive_folder
from bitnet_lit.data.stories import read_stories
from bitnet_lit.data.tokenizers import Tokenizer, find_tokenizer, open_tokenizer
from bitnet_lit.data.tokenizers.train_sentencepiece import train_tokenizer
from bitnet_lit.data.write_shards import fingerprint, write_shards
from bitnet_lit.errors import UserError
from bitnet_lit.terminal import console

_ELSEWHERE = "choose another out=, or delete the folder"
TOKENIZER_TEXT_BYTES = 100 * 2**20  # llama2.c trains on its first ten shards; more text hardly changes a vocabulary
# The demo's few hundred words fit as one token each, so that a story fits a short context.
DEMO_VOCAB_SIZE, DEFAULT_VOCAB_SIZE = 1024, 4096


def _shard_plans(config: PrepareConfig) -> tuple[list[ShardPlan], str]:
    """The shards of a source, and what of it is passed over, in words."""
    if config.source == "demo":
        return demo_shards(config.num_stories, config.seed), ""
    if config.source == "tinystories":
        folder = Path(config.download_dir or config.folder)
        # The output folder is locked already; another one may be the target of several calls' downloads.
        is_out = os.path.realpath(folder) == os.path.realpath(config.folder)
        with contextlib.nullcontext() if is_out else exclusive_folder(folder, "download_dir"):
            return file_shards(fetch_tinystories(folder)), ""
    found = find_text(config.source)
    return file_shards(found.files), found.describe_passed_over()


def _training_text(plans: list[ShardPlan]) -> Iterator[str]:
    """Stories to train a tokenizer on: those of the training shards (all of a single shard's)."""
    size = 0
    for plan in plans[1:] or plans:
        for segment in plan.segments:
            for story in read_stories(segment):
                yield story
                size += len(story)
                if size > TOKENIZER_TEXT_BYTES:
                    return


def _check_folder(out: Path, plans: list[ShardPlan], meta: dict[str, Any], identity: dict[str, str]) -> None:
    """Refuse to mix shards: those of other text, another tokenizer, or somebody else's."""
    if not meta:
        foreign = sorted(path.name for path in out.iterdir() if path.suffix == ".bin")
        if foreign:
            raise UserError(f"out={out}: {foreign[0]} lies there without a {META_NAME} of ours: {_ELSEWHERE}")
        return
    if "shards" not in meta:
        raise UserError(f"out={out}: its {META_NAME} is not one that prepare wrote: {_ELSEWHERE}")
    if any(meta.get(key) != value for key, value in identity.items()):
        raise UserError(f"out={out}: holds shards of another tokenizer or source: {_ELSEWHERE}")
    if gone := set(meta["shards"]) - {plan.name for plan in plans}:
        raise UserError(f"out={out}: holds {min(gone)}, whose text is no longer in the source: {_ELSEWHERE}")


def _identity(config: PrepareConfig, plans: list[ShardPlan]) -> dict[str, str]:
    """What must be the same for a call to go on with a folder: where tokenizer and text come from."""
    if config.tokenizer:
        tokenizer = f"copied/{open_tokenizer(config.tokenizer).sha256}"
    else:
        default = DEMO_VOCAB_SIZE if config.source == "demo" else DEFAULT_VOCAB_SIZE
        tokenizer = f"trained/{config.vocab_size or default}/{fingerprint(plans)}"
    if config.source == "demo":
        source = f"demo/{config.seed}/{config.num_stories}"
    else:
        path = os.fsencode(os.path.abspath(config.source)).decode("utf-8", "backslashreplace")  # a name of any bytes
        source = "tinystories" if config.source == "tinystories" else path
    return {"tokenizer_origin": tokenizer, "source": source}


def _train_into(out: Path, plans: list[ShardPlan], vocab_size: int) -> Tokenizer:
    """Train the folder's tokenizer; one that lies there already must be the same, left by a call that was killed."""
    there = find_tokenizer(out)
    if there is None:
        return train_tokenizer(_training_text(plans), vocab_size, out / "tokenizer.model")
    again = out / f".tokenizer.{os.getpid()}.tmp"
    try:
        trained = train_tokenizer(_training_text(plans), vocab_size, again)
    finally:
        again.unlink(missing_ok=True)
    if there.name != "tokenizer.model" or open_tokenizer(there).sha256 != trained.sha256:
        raise UserError(
            f"out={out}: {there.name} lies there without a {META_NAME} of ours: {_ELSEWHERE}, or name it: "
            f"tokenizer={there}"
        )
    return open_tokenizer(there)


def _ensure_tokenizer(config: PrepareConfig, out: Path, plans: list[ShardPlan], meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer of `out`: copied, trained, or the one that an earlier call left there."""
    identity = _identity(config, plans)
    _check_folder(out, plans, meta, identity)
    there = find_tokenizer(out)
    if meta and there:
        tokenizer = open_tokenizer(there)
    elif config.tokenizer:
        tokenizer = open_tokenizer(config.tokenizer)
        if there and open_tokenizer(there).sha256 != tokenizer.sha256:
            raise UserError(f"out={out}: {there.name} there is not tokenizer={config.tokenizer}: {_ELSEWHERE}")
        tokenizer.copy_to(out)
    else:
        tokenizer = _train_into(out, plans, int(identity["tokenizer_origin"].split("/")[1]))
    described = {
        "format_version": META_VERSION,
        "dtype": dtype_for(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.sha256,
        **identity,
    }
    if not meta:
        meta |= {**described, "complete": False, "shards": {}}
        write_meta(out, meta)
    elif wrong := next((key for key, value in described.items() if meta.get(key) != value), None):
        raise UserError(
            f"out={out}: {META_NAME} says {wrong}={meta.get(wrong)}, its tokenizer {described[wrong]}: {_ELSEWHERE}"
        )
    return tokenizer


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write a folder of shards, or finish one.

    Returns:
        shards, stories, tokens, text_bytes, bytes_per_token and vocab_size of the folder; files, documents and bytes_in
        that were read for it; seconds of this call and megabytes_per_s, the text that it encoded in them.

    Raises:
        UserError: text, tokenizer or folder that cannot be used; whole shards stay, nothing half-written does.
    """
    out = config.folder
    with exclusive_folder(out):
        plans, passed_over = _shard_plans(config)
        if passed_over:
            _say(f"source={config.source}: not read: {passed_over}")
        meta = read_meta(out, _ELSEWHERE)
        start = time.perf_counter()
        tokenizer = _ensure_tokenizer(config, out, plans, meta)
        todo = [plan for plan in plans if not _is_done(plan, out, meta)]

        def done(plan: ShardPlan, entry: dict[str, Any]) -> None:
            meta["shards"][plan.name] = entry
            write_meta(out, meta)

        write_shards(plans, todo, out, tokenizer, config.num_workers, done)
        if todo or not meta.get("complete"):
            meta["complete"] = True
            write_meta(out, meta)
    seconds = time.perf_counter() - start
    entries = meta["shards"]
    summary = _sums(plans, entries) | {
        "shards": len(entries),
        "vocab_size": tokenizer.vocab_size,
        "seconds": seconds,
        "megabytes_per_s": sum(entries[plan.name]["text_bytes"] for plan in todo) / 1e6 / seconds,
    }
    if todo:
        _say_what_was_done(config, summary)
    return summary


def _sums(plans: list[ShardPlan], entries: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Figures of the whole folder. Shards of an earlier version do not note what was read for them."""
    sums: dict[str, Any] = {
        key: sum(entry.get(key, 0) for entry in entries.values())
        for key in ("stories", "tokens", "text_bytes", "empty", "carriage_returns")
    }
    for key, instead in (("documents", "stories"), ("bytes_in", "text_bytes")):
        sums[key] = sum(entry.get(key, entry[instead]) for entry in entries.values())
    sums["files"] = len({segment.path for plan in plans for segment in plan.segments if segment.path})
    sums["bytes_per_token"] = sums["text_bytes"] / max(sums["tokens"], 1)
    return sums


def _say_what_was_done(config: PrepareConfig, summary: dict[str, Any]) -> None:
    if summary["files"]:
        read = f"read {summary['files']:,} files, {summary['documents']:,} documents, {summary['bytes_in']:,} bytes"
        if summary["empty"]:
            read += f"; {summary['empty']:,} documents without text"
        if summary["carriage_returns"]:
            read += f"; {summary['carriage_returns']:,} stories of .json with carriage returns, kept as llama2.c does"
        _say(f"source={config.source}: {read}")
    _say(
        f"{config.folder}: {summary['shards']} shards, {summary['stories']:,} stories, {summary['tokens']:,} tokens of "
        f"{summary['vocab_size']:,}, {summary['bytes_per_token']:.3f} bytes a token, "
        f"{summary['seconds']:.1f} s, {summary['megabytes_per_s']:.1f} MB/s"
    )


def _say(line: str) -> None:
    console(stderr=True).print(line)


def _is_done(plan: ShardPlan, out: Path, meta: dict[str, Any]) -> bool:
    entry = meta["shards"].get(plan.name)
    path = out / plan.name
    if entry is None or entry["fingerprint"] != fingerprint([plan]) or not path.is_file():
        return False
    return path.stat().st_size == entry["tokens"] * np.dtype(meta["dtype"]).itemsize
