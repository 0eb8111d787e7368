"""Stories are read out of text files here.

    .json    llama2.c's form: a list of {"story": ...}
    .jsonl   an object with "story" or "text" on each line
    .txt     documents with <|endoftext|> between them, as in TinyStories' own files; without it, one document

A story is what `prepare` encodes behind one BOS. <|endoftext|> divides documents wherever it stands, also inside a line
and inside the text of a JSON record, and never becomes text to train on. A suffix may be written in capitals. Text is
UTF-8; a byte order mark at the start of a file is not part of the text.

Line ends "\\r\\n" and "\\r" become "\\n" in .txt and .jsonl, or a model trained on files from Windows would learn to
write carriage returns. The text of .json stays as it is, because its tokens must be llama2.c's byte for byte; stories
in it that hold carriage returns are counted.

A story has no white space at its ends. Documents without text are left out and counted, except those of .json: llama2.c
keeps them as a BOS without text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bitnet_lit.data.sources.find_text import suffix_of
from bitnet_lit.data.sources.source import ReadCounts, Segment
from bitnet_lit.data.tokenizers.tokenizer import without_surrogates
from bitnet_lit.errors import UserError
from bitnet_lit.regular_file import open_regular

SEPARATOR = "<|endoftext|>"
_BLOCK = 2**20  # bytes to search at once
_MEND = "mend the file, or take it out of the source"
READ_REMEDY = "check the file and its permissions"


@dataclass(frozen=True)
class FileSegment(Segment):
    """Reads the bytes [start, stop) of a text file."""

    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.stop - self.start

    def __str__(self) -> str:
        return str(self.path)

    def fingerprint(self) -> str:
        """Return the path, size, modification time and range.

        Raises:
            UserError: the file is not there any more.
        """
        try:
            status = self.path.stat()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}): {READ_REMEDY}") from None
        return f"{self.path.absolute()}/{status.st_size}/{status.st_mtime_ns}/{self.start}-{self.stop}"

    def stories(self, counts: ReadCounts) -> Iterator[str]:
        """Yield the stories of this part of the file.

        Raises:
            UserError: the file does not hold what its suffix promises; the line names the file and the record.
        """
        suffix = suffix_of(self.path)
        texts = {".json": _json_texts, ".jsonl": _jsonl_texts, ".txt": _txt_texts}[suffix]
        counts.bytes_in += self.size
        for text in texts(self, _content(self)):
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


def _content(segment: FileSegment) -> str:
    """Return the text of a segment as it stands in the file, without the byte order mark that some editors write."""
    path = segment.path
    with open_regular(path, READ_REMEDY) as file:
        try:
            file.seek(segment.start)
            raw = file.read(segment.size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): {READ_REMEDY}") from None
    if len(raw) != segment.size:
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


def _json_texts(segment: FileSegment, content: str) -> Iterator[str]:
    # Not through `foreign_json`, which is made for small files and refuses half of a surrogate pair: in a story it
    # becomes U+FFFD.
    path = segment.path
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}): {_MEND}") from None
    if not isinstance(records, list):
        raise UserError(f"{path}: holds a {type(records).__name__}, not a list of {{'story': ...}}: {_MEND}")
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("story"), str):
            raise UserError(f"{path}: record {number} has no text under 'story': {_MEND}")
        yield record["story"]


def _jsonl_texts(segment: FileSegment, content: str) -> Iterator[str]:
    for number, line in enumerate(_with_unix_line_ends(content).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{_line(segment, number)} is not JSON ({error}): {_MEND}") from None
        text = record.get("story", record.get("text")) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{_line(segment, number)} has no text under 'story' or 'text': {_MEND}")
        yield _with_unix_line_ends(text)


def _txt_texts(segment: FileSegment, content: str) -> Iterator[str]:
    yield _with_unix_line_ends(content)


def _with_unix_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _line(segment: FileSegment, number: int) -> str:
    """Name line `number` of a segment by its number in the whole file, as an editor shows it."""
    with open_regular(segment.path, READ_REMEDY) as file:
        before = sum(file.read(min(2**20, segment.start - at)).count(b"\n") for at in range(0, segment.start, 2**20))
    return f"{segment.path}: line {before + number}"


def document_ends(path: Path, every: int) -> list[int]:
    """Return the byte offsets where parts of a file end: behind documents, about `every` bytes apart, and at its end.

    A part ends behind what divides documents: the separator, or the end of a .jsonl line. So the parts hold the same
    stories as the whole file.
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
                if not file.read(_BLOCK).strip():  # white space only: it stays with the part before
                    ends.pop()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): {READ_REMEDY}") from None
    return [*ends, size]


def _find(file: BinaryIO, marker: bytes, position: int) -> int | None:
    """Return the offset behind the first `marker` at or after `position`; None where there is none."""
    file.seek(position)
    kept = b""
    while block := file.read(_BLOCK):
        searched = kept + block
        if (at := searched.find(marker)) >= 0:
            return position - len(kept) + at + len(marker)
        position += len(block)
        kept = searched[len(searched) - len(marker) + 1 :] if len(marker) > 1 else b""
    return None
