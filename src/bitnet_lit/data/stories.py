"""Reading documents out of text files: what `prepare` encodes as stories.

    .json    llama2.c's form: a list of {"story": ...}
    .jsonl   an object with "story" or "text" on each line
    .txt     documents with <|endoftext|> between them, as in TinyStories' own files; else the file is one document

<|endoftext|> divides documents wherever it stands, inside a line and inside the text of a JSON record too: it is never
text to train on. Suffixes may be written in capitals. Text is UTF-8; a byte order mark at the start is no text.

Line ends: "\\r\\n" and "\\r" become "\\n" in .txt and .jsonl, or a model trained on files from Windows would learn to
write carriage returns. The text of .json stays as it is, because its tokens are llama2.c's, byte for byte; stories in
it that hold carriage returns are counted.

A story is stripped of white space at both ends. Documents without text are left out and counted. Only those of .json
stay, as a BOS without text: llama2.c keeps them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bitnet_lit.data.demo import demo_story
from bitnet_lit.data.find_text import suffix_of
from bitnet_lit.data.tokenizers.tokenizer import without_surrogates
from bitnet_lit.errors import UserError
from bitnet_lit.regular_file import open_regular

SEPARATOR = "<|endoftext|>"
_BLOCK = 2**20  # bytes to search at once
READ_REMEDY = "check the file and its permissions"


@dataclass(frozen=True)
class Segment:
    """Something to read stories from: bytes [start, stop) of a file, or demo stories [start, stop) of a seed."""

    path: Path | None
    start: int
    stop: int
    seed: int = 0

    def fingerprint(self) -> str:
        """Changes when what would be read changes (for a file: its place, size and time).

        Raises:
            UserError: a file that is not there any more.
        """
        if self.path is None:
            return f"demo/{self.seed}/{self.start}-{self.stop}"
        try:
            status = self.path.stat()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}): {READ_REMEDY}") from None
        return f"{self.path.absolute()}/{status.st_size}/{status.st_mtime_ns}/{self.start}-{self.stop}"


@dataclass
class ReadCounts:
    """Counts of what `read_stories` met.

    Attributes:
        documents: records of JSON, parts with text of .txt.
        empty: of these, without text.
        carriage_returns: stories of .json that hold some.
    """

    documents: int = 0
    empty: int = 0
    carriage_returns: int = 0


def read_stories(segment: Segment, counts: ReadCounts | None = None) -> Iterator[str]:
    """The stories of a segment, stripped.

    Args:
        counts: added to while reading.

    Raises:
        UserError: a file that does not hold what its name promises; names the file and the record.
    """
    counts = ReadCounts() if counts is None else counts
    if segment.path is None:
        for index in range(segment.start, segment.stop):
            counts.documents += 1
            yield demo_story(segment.seed, index)
        return
    suffix = suffix_of(segment.path)
    readers = {".json": _json_texts, ".jsonl": _jsonl_texts, ".txt": _txt_texts}
    for text in readers[suffix](segment, _content(segment)):
        stories = [part.strip() for part in without_surrogates(text).split(SEPARATOR)]
        if not any(stories):
            counts.empty += suffix != ".txt"
            counts.documents += suffix != ".txt"
            stories = [""] if suffix == ".json" else []
        else:
            stories = [story for story in stories if story]
            counts.documents += len(stories) if suffix == ".txt" else 1
        counts.carriage_returns += sum("\r" in story for story in stories)
        yield from stories


def _content(segment: Segment) -> str:
    """The text of a segment as it stands in the file, without the byte order mark that some editors write."""
    path = segment.path
    assert path is not None
    with open_regular(path, READ_REMEDY) as file:
        try:
            file.seek(segment.start)
            raw = file.read(segment.stop - segment.start)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): {READ_REMEDY}") from None
    if len(raw) != segment.stop - segment.start:
        raise UserError(f"{path}: became shorter while it was read: give the same command again")
    if segment.start == 0 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: UTF-16, not UTF-8: convert it (iconv -f utf-16 -t utf-8)")
    if (at := raw.find(b"\0")) >= 0:
        raise UserError(
            f"{path}: a NUL at byte {segment.start + at}: no text, or UTF-16: convert it (iconv -f utf-16le -t utf-8)"
        )
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {segment.start + error.start}: convert it (iconv -f latin1 -t utf-8, if that "
            "is what it is)"
        ) from None
    return content.removeprefix("\ufeff") if segment.start == 0 else content


def _json_texts(segment: Segment, content: str) -> Iterator[str]:
    # Not through `foreign_json`: of a file of millions of records two things matter, and each is checked here. Half of
    # a character pair is no error in a story, it becomes U+FFFD.
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


def _jsonl_texts(segment: Segment, content: str) -> Iterator[str]:
    for number, line in enumerate(_with_unix_line_ends(content).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{_line(segment, number)} is not JSON ({error})") from None
        text = record.get("story", record.get("text")) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{_line(segment, number)} has no text under 'story' or 'text'")
        yield _with_unix_line_ends(text)


def _txt_texts(segment: Segment, content: str) -> Iterator[str]:
    yield _with_unix_line_ends(content)


def _with_unix_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _line(segment: Segment, number: int) -> str:
    """Line `number` of a segment, as the line of its file that an editor would show."""
    assert segment.path is not None
    with open_regular(segment.path, READ_REMEDY) as file:
        before = sum(file.read(min(2**20, segment.start - at)).count(b"\n") for at in range(0, segment.start, 2**20))
    return f"{segment.path}: line {before + number}"


def document_ends(path: Path, every: int) -> list[int]:
    """Offsets where a large file can be cut: bytes behind a document, about `every` bytes apart; the last is its end.

    A cut falls behind what divides documents for `read_stories` too: the separator, or the end of a .jsonl line.
    """
    marker = b"\n" if suffix_of(path) == ".jsonl" else SEPARATOR.encode()
    ends: list[int] = []
    with open_regular(path, READ_REMEDY) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            position = every
            while position < size and (end := _find(file, marker, position)) is not None and end < size:
                ends.append(end)
                position = end + every
            if ends and size - ends[-1] <= _BLOCK:
                file.seek(ends[-1])
                if not file.read(_BLOCK).strip():  # no document of its own: it stays with the last one
                    ends.pop()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): {READ_REMEDY}") from None
    return [*ends, size]


def _find(file: BinaryIO, marker: bytes, position: int) -> int | None:
    """The offset behind the first `marker` at or after `position`."""
    file.seek(position)
    kept = b""
    while block := file.read(_BLOCK):
        searched = kept + block
        if (at := searched.find(marker)) >= 0:
            return position - len(kept) + at + len(marker)
        position += len(block)
        kept = searched[len(searched) - len(marker) + 1 :] if len(marker) > 1 else b""
    return None
