"""Text to llama2.c shards: what `python -m bitnet_lit.prepare` does.

The bytes are those of llama2.c's `tinystories.py pretokenize`: for each story, stripped, a BOS and its tokens. Every
shard is written by one process and appears at once; `meta.json` notes it then. So an interrupted call leaves whole
shards, and the same call again skips them.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bitnet_lit.atomic import atomic_file
from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.corpus import ShardPlan, demo_shards, file_shards, find_files, read_stories
from bitnet_lit.data.download import fetch_tinystories
from bitnet_lit.data.fast_encoder import FastEncoder
from bitnet_lit.data.json_tokenizer import find_tokenizer, open_tokenizer
from bitnet_lit.data.meta import META_NAME, META_VERSION, dtype_for, read_meta, write_meta
from bitnet_lit.data.output_folder import exclusive_folder
from bitnet_lit.data.processes import without_main_script
from bitnet_lit.data.tokenizer import Tokenizer, train_tokenizer
from bitnet_lit.errors import UserError

_ELSEWHERE = "choose another out=, or delete the folder"
TOKENIZER_TEXT_BYTES = 100 * 2**20  # llama2.c trains on its first ten shards; more text hardly changes a vocabulary
# The demo's few hundred words fit as one token each, so that a story fits a short context.
DEMO_VOCAB_SIZE, DEFAULT_VOCAB_SIZE = 1024, 4096

# Of a worker process: its tokenizer, and the encoder, whose cache of words lasts from shard to shard.
_tokenizer_path: Path | None = None
_encoder: FastEncoder | None = None


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


def _make_encoder(tokenizer_path: Path) -> FastEncoder:
    tokenizer = open_tokenizer(tokenizer_path)
    return FastEncoder(tokenizer, dtype_for(tokenizer.vocab_size))


def _write_in_worker(plan: ShardPlan, out: Path, bos_id: int) -> dict[str, Any]:
    global _encoder
    assert _tokenizer_path is not None
    if _encoder is None:  # not when the process starts: an error there would say nothing of its cause
        _encoder = _make_encoder(_tokenizer_path)
    return write_shard(plan, out, _encoder, bos_id)


def write_shard(plan: ShardPlan, out: Path, encoder: FastEncoder, bos_id: int) -> dict[str, Any]:
    """Encode one shard and write it; returns its entry in meta.json.

    Raises:
        UserError: no text in it, or text that cannot be read.
    """
    bos = np.array([bos_id], dtype=encoder.dtype).tobytes()
    stories = text_bytes = 0
    with atomic_file(out / plan.name) as temporary, temporary.open("wb") as file:
        for segment in plan.segments:
            for story in read_stories(segment):
                file.write(bos + encoder.encode(story))
                stories += 1
                text_bytes += len(story.encode())
        tokens = file.tell() // encoder.dtype.itemsize
        if not tokens:
            raise UserError(f"{plan.segments[0].path}: no text in it: take the file away, or give another source")
    return {"tokens": tokens, "stories": stories, "text_bytes": text_bytes, "fingerprint": _fingerprint([plan])}


def _fingerprint(plans: list[ShardPlan]) -> str:
    parts = [segment.fingerprint() for plan in plans for segment in plan.segments]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _shard_plans(config: PrepareConfig) -> list[ShardPlan]:
    if config.source == "demo":
        return demo_shards(config.num_stories, config.seed)
    if config.source == "tinystories":
        return file_shards(fetch_tinystories(Path(config.download_dir or config.folder)))
    return file_shards(find_files(config.source))


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
        tokenizer = f"trained/{config.vocab_size or default}/{_fingerprint(plans)}"
    if config.source == "demo":
        source = f"demo/{config.seed}/{config.num_stories}"
    else:
        source = "tinystories" if config.source == "tinystories" else os.path.abspath(config.source)
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
    return Tokenizer(there)


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
        shards, stories, tokens, text_bytes, bytes_per_token and vocab_size of the folder; seconds of this call and
        megabytes_per_s, the text that it encoded in them.

    Raises:
        UserError: text, tokenizer or folder that cannot be used; whole shards stay, nothing half-written does.
    """
    out = config.folder
    with exclusive_folder(out):
        plans = _shard_plans(config)
        meta = read_meta(out, _ELSEWHERE)
        start = time.perf_counter()
        tokenizer = _ensure_tokenizer(config, out, plans, meta)
        todo = [plan for plan in plans if not _is_done(plan, out, meta)]
        _write_all(config, out, plans, todo, tokenizer, meta)
        if todo or not meta.get("complete"):
            meta["complete"] = True
            write_meta(out, meta)
    entries = meta["shards"]
    seconds = time.perf_counter() - start
    summary = {key: sum(entry[key] for entry in entries.values()) for key in ("stories", "tokens", "text_bytes")}
    summary |= {
        "shards": len(entries),
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": summary["text_bytes"] / summary["tokens"],
        "seconds": seconds,
        "megabytes_per_s": sum(entries[plan.name]["text_bytes"] for plan in todo) / 1e6 / seconds,
    }
    if todo:
        Console(stderr=True).print(
            f"{out}: {summary['shards']} shards, {summary['stories']:,} stories, {summary['tokens']:,} tokens of "
            f"{tokenizer.vocab_size:,}, {summary['bytes_per_token']:.3f} bytes a token, "
            f"{seconds:.1f} s, {summary['megabytes_per_s']:.1f} MB/s",
            highlight=False,
            soft_wrap=True,
        )
    return summary


def _is_done(plan: ShardPlan, out: Path, meta: dict[str, Any]) -> bool:
    entry = meta["shards"].get(plan.name)
    path = out / plan.name
    if entry is None or entry["fingerprint"] != _fingerprint([plan]) or not path.is_file():
        return False
    return path.stat().st_size == entry["tokens"] * np.dtype(meta["dtype"]).itemsize


def _write_all(
    config: PrepareConfig,
    out: Path,
    plans: list[ShardPlan],
    todo: list[ShardPlan],
    tokenizer: Tokenizer,
    meta: dict[str, Any],
) -> None:
    """Write the shards in `todo`, on several processes where there are several shards."""
    workers = min(config.num_workers or os.cpu_count() or 1, len(todo))
    columns = (TextColumn("encoding"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not todo or not console.is_terminal) as progress:
        task = progress.add_task("encode", total=sum(plan.text_bytes for plan in plans))
        progress.advance(task, sum(plan.text_bytes for plan in plans if plan not in todo))

        def done(plan: ShardPlan, entry: dict[str, Any]) -> None:
            meta["shards"][plan.name] = entry
            write_meta(out, meta)
            progress.advance(task, plan.text_bytes)

        if workers <= 1:
            encoder = _make_encoder(tokenizer.path)
            for plan in todo:
                done(plan, write_shard(plan, out, encoder, tokenizer.bos_id))
            return
        context = multiprocessing.get_context("spawn")  # fork copies locks that other threads hold
        with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path,)) as pool:
            try:
                with without_main_script():
                    futures = {pool.submit(_write_in_worker, plan, out, tokenizer.bos_id): plan for plan in todo}
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BrokenProcessPool:  # of the futures, or of a submit when it is broken already
                raise UserError(
                    f"num_workers={workers}: an encoding process was killed, most likely for memory: take fewer"
                ) from None
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
