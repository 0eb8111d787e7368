"""Sources of text, cut into shards.

A shard is a list of segments, a segment is a part of a source that can be read by itself (a whole JSON file, a byte
range of a large .jsonl or .txt file, a range of demo stories). So every process reads its own text, and no process
ever holds more than a shard's.

    .json    llama2.c's form: a list of {"story": ...}; one file is one shard, as llama2.c does it
    .jsonl   an object with "story" or "text" on each line
    .txt     documents separated by a line <|endoftext|>, as in TinyStories' own files; else the file is one document

Small .jsonl and .txt files share a shard, large ones are cut at document borders, at about SHARD_TEXT_BYTES.
"""

from __future__ import annotations

import contextlib
import glob
import json
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bitnet_lit.data.demo import demo_story
from bitnet_lit.data.tokenizer import without_surrogates
from bitnet_lit.errors import UserError

SHARD_TEXT_BYTES = 64 * 2**20
SEPARATOR = "<|endoftext|>"
SUFFIXES = (".json", ".jsonl", ".txt")
OWN_NAMES = ("meta.json",)  # ours, in a folder that text and shards share as llama2.c's do
DEMO_VALIDATION_SHARE = 0.02


@dataclass(frozen=True)
class Segment:
    """Something to read stories from: bytes [start, stop) of a file, or demo stories [start, stop) of a seed."""

    path: Path | None
    start: int
    stop: int
    seed: int = 0

    def fingerprint(self) -> str:
        """Changes when what would be read changes (for a file: its place, size and time)."""
        if self.path is None:
            return f"demo/{self.seed}/{self.start}-{self.stop}"
        status = self.path.stat()
        return f"{self.path.absolute()}/{status.st_size}/{status.st_mtime_ns}/{self.start}-{self.stop}"


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: its file name and where its text comes from."""

    name: str
    segments: tuple[Segment, ...]

    @property
    def text_bytes(self) -> int:
        """About how much text it is, for a progress bar."""
        return sum(segment.stop - segment.start for segment in self.segments)


def demo_shards(num_stories: int, seed: int) -> list[ShardPlan]:
    """Two shards of the demo corpus: the first fiftieth for validation."""
    validation = max(1, int(num_stories * DEMO_VALIDATION_SHARE))
    if num_stories < 2:
        raise UserError(f"num_stories={num_stories}: at least 2, one for validation and one for training")
    ranges = [(0, validation), (validation, num_stories)]
    return [ShardPlan(f"data{i:02d}.bin", (Segment(None, *r, seed=seed),)) for i, r in enumerate(ranges)]


def find_files(source: str) -> list[Path]:
    """The text files that a path or a glob means, sorted.

    Raises:
        UserError: nothing there, or nothing that can be read as text.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.suffix in SUFFIXES and file.name not in OWN_NAMES and file.is_file()
        )
        if not found:
            raise UserError(f"source={source}: no {', '.join(SUFFIXES)} files in this folder")
        return found
    matches = [source] if path.is_file() else glob.glob(source, recursive=True)
    found = sorted(Path(name) for name in matches if Path(name).is_file())
    if not found:
        raise UserError(f"source={source}: no such file, folder or glob (or name a built-in source: demo, tinystories)")
    for file in found:
        if file.suffix not in SUFFIXES:
            raise UserError(f"{file}: cannot read '{file.suffix}' files: give {', '.join(SUFFIXES)}")
    return found


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from None


def _document_ends(path: Path, every: int) -> list[int]:
    """Byte offsets behind a document, about `every` bytes apart; the last is the end of the file."""
    marker = re.compile(b"\n" if path.suffix == ".jsonl" else rb"\n%b[ \t\r]*\n" % re.escape(SEPARATOR.encode()))
    ends: list[int] = []
    with _reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > every:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                position = every
                while (found := marker.search(data, position)) and found.end() < size:
                    ends.append(found.end())
                    position = ends[-1] + every
    return [*ends, size]


def file_shards(files: list[Path]) -> list[ShardPlan]:
    """Shards of text files: each .json file its own, the others grouped and cut (see the module)."""
    groups: list[list[Segment]] = []
    open_bytes = SHARD_TEXT_BYTES  # of the group that small files still join; full: the next one begins
    for path in files:
        if path.suffix == ".json":
            with _reading(path):
                groups.append([Segment(path, 0, path.stat().st_size)])
            open_bytes = SHARD_TEXT_BYTES
            continue
        start = 0
        for stop in _document_ends(path, SHARD_TEXT_BYTES):
            if open_bytes >= SHARD_TEXT_BYTES:
                groups.append([])
                open_bytes = 0
            groups[-1].append(Segment(path, start, stop))
            open_bytes += stop - start
            start = stop
    named = [re.fullmatch(r"data\d+", group[0].path.stem) for group in groups if group[0].path]
    if len(files) == len(groups) and all(named):  # llama2.c's names are kept
        return [ShardPlan(f"{path.stem}.bin", tuple(group)) for path, group in zip(files, groups, strict=True)]
    width = max(2, len(str(len(groups) - 1)))
    return [ShardPlan(f"data{i:0{width}d}.bin", tuple(group)) for i, group in enumerate(groups)]


def read_stories(segment: Segment) -> Iterator[str]:
    """The stories of a segment, stripped. Empty ones are left out, but not of a .json file: llama2.c keeps their BOS.

    Raises:
        UserError: a file that does not hold what its name promises; names the file and the record.
    """
    if segment.path is None:
        yield from (demo_story(segment.seed, index) for index in range(segment.start, segment.stop))
        return
    with _reading(segment.path), segment.path.open("rb") as file:
        file.seek(segment.start)
        raw = file.read(segment.stop - segment.start)
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{segment.path}: not UTF-8 at byte {segment.start + error.start}: convert it (iconv -t utf-8)"
        ) from None
    if segment.start == 0:
        content = content.removeprefix("\ufeff")  # the byte order mark that some editors write
    suffix = segment.path.suffix
    readers = {".json": _json_stories, ".jsonl": _jsonl_stories, ".txt": _txt_stories}
    for story in readers[suffix](segment, content):
        story = without_surrogates(story.strip())
        if story or suffix == ".json":
            yield story


def _json_stories(segment: Segment, content: str) -> Iterator[str]:
    path = segment.path
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(records, list):
        raise UserError(f"{path}: holds a {type(records).__name__}, not a list of {{'story': ...}}")
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("story"), str):
            raise UserError(f"{path}: record {number} has no text under 'story'")
        yield record["story"]


def _jsonl_stories(segment: Segment, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{_line(segment, number)} is not JSON ({error})") from None
        text = record.get("story", record.get("text")) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{_line(segment, number)} has no text under 'story' or 'text'")
        yield text


def _line(segment: Segment, number: int) -> str:
    """Line `number` of a segment, as the line of its file that an editor would show."""
    assert segment.path is not None
    with segment.path.open("rb") as file:
        before = sum(file.read(min(2**20, segment.start - at)).count(b"\n") for at in range(0, segment.start, 2**20))
    return f"{segment.path}: line {before + number}"


def _txt_stories(segment: Segment, content: str) -> Iterator[str]:
    yield from re.split(rf"^{re.escape(SEPARATOR)}\s*$", content, flags=re.MULTILINE)
