"""Stories are read out of text files here.

    .json    llama2.c's form: a list of {"story": ...}
    .jsonl   an object with "story" or "text" on each line
    .txt     documents with <|endoftext|> between them, as in TinyStories' own files; without it, one document

Each of them may be compressed (open_text.py). A file is read in pieces, but for .json, which is one value.

A story is what `prepare` encodes behind one BOS. <|endoftext|> divides documents wherever it stands, also inside a line
and inside the text of a JSON record, and never becomes text to train on. A suffix may be written in capitals. Text is
UTF-8; a byte order mark at the start of a file is not part of the text.

Line ends "\\r\\n" and "\\r" become "\\n" in .txt and .jsonl, or a model trained on files from Windows would learn to
write carriage returns. The text of .json stays as it is, because its tokens must be llama2.c's byte for byte; stories
in it that hold carriage returns are counted.

A story has no white space at its ends. Documents without text are left out and counted, except those of .json: llama2.c
keeps them as a BOS without text.

A document of more than four million characters (a .txt of 5 GB without a separator) is cut between two words. What
follows is a `Continuation`, which gets no BOS: the tokens are those of the whole document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bitnet_lit.data.sources.documents import SEPARATOR, documents_of_record, with_unix_line_ends
from bitnet_lit.data.sources.find_text import kind_of
from bitnet_lit.data.sources.open_text import READ_REMEDY, compression_of, file_state, text_of
from bitnet_lit.data.sources.source import Continuation, ReadCounts, Segment
from bitnet_lit.errors import UserError, read_errors
from bitnet_lit.files.regular_file import open_regular

LONGEST_CHARACTERS = 2**22  # of a document that is held as a whole: larger texts cost the system new memory each time
LONGEST_LINE_CHARACTERS = 2**28  # of a .jsonl file, whose records are documents; and of a text without spaces
_BLOCK = 2**20  # bytes to search at once
_OVERLAP = 16  # bytes of the block before that are searched again: more than a separator has
_MEND = "mend the file, or take it out of the source"
# A document may be cut at one space between two characters that are neither white space nor SentencePiece's sign for a
# space. In UTF-8 these are all characters but U+0085, U+00A0, U+1680, U+2000-205F, U+2581 and U+3000; the whole of
# U+0080-00BF and U+2000-2FFF is left out, because the text has other spaces.
_BORDER = re.compile(r"(?<=[^\s\u2581]) (?=[^\s\u2581])")
_BORDER_BYTES = re.compile(
    rb"(?:(?<=[!-~])|(?<=[\xc3-\xdf][\x80-\xbf])|(?<=[\xe0\xe4-\xef][\x80-\xbf]{2})"
    rb"|(?<=\xe1[\x80-\x99\x9b-\xbf][\x80-\xbf])|(?<=\xe3[\x81-\xbf][\x80-\xbf])"
    rb"|(?<=[\xf0-\xf4][\x80-\xbf]{3})) "
    rb"(?=[!-~\xc3-\xe0\xe4-\xf4]|\xe1[\x80-\x99\x9b-\xbf]|\xe3[\x81-\xbf])"
)


@dataclass(frozen=True)
class FileSegment(Segment):
    """Reads the bytes [start, stop) of a text file, or all of a compressed one.

    Attributes:
        column: the key of a .jsonl record that has the text. None: "story" or "text".
        continues: whether it begins inside a document.
    """

    path: Path
    start: int
    stop: int
    column: str | None = None
    continues: bool = False

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
        more = f"/{self.column}" if self.column else ""
        return f"{file_state(self.path)}/{self.start}-{self.stop}{more}"

    def stories(self, counts: ReadCounts) -> Iterator[str]:
        """Yield the stories of this part of the file.

        Raises:
            UserError: the file does not hold what its suffix promises; the line names the file and the record.
        """
        kind, pieces = kind_of(self.path), _counted(self, counts)
        if kind == ".txt":
            yield from _txt_stories(self, pieces, counts)
        elif kind == ".jsonl":
            for text in _jsonl_texts(self, pieces):
                yield from documents_of_record(text, counts)
        else:
            for text in _json_texts(self, "".join(pieces)):
                stories = list(documents_of_record(text, counts)) or [""]
                counts.carriage_returns += sum("\r" in story for story in stories)
                yield from stories


def _counted(segment: FileSegment, counts: ReadCounts) -> Iterator[str]:
    """Yield the text of a segment in pieces, and count its bytes."""
    if compression_of(segment.path):
        for piece in text_of(segment.path):
            counts.bytes_in += len(piece.encode())
            yield piece
    else:
        counts.bytes_in += segment.size
        yield from text_of(segment.path, segment.start, segment.stop)


def _txt_stories(segment: FileSegment, pieces: Iterator[str], counts: ReadCounts) -> Iterator[str]:
    """Yield the documents between separators; one that is too long comes in parts.

    What has been searched is kept in pieces, and joined once: joined with each new piece, a long document would be
    copied again and again.
    """
    kept: list[str] = []  # of the document that goes on
    size, tail, continues = 0, "", segment.continues

    def take(text: str) -> str:
        """Return the document that ends with `text`."""
        nonlocal size
        document, size = "".join([*kept, text]), 0
        kept.clear()
        return document

    for piece in pieces:
        *documents, text = (tail + piece).split(SEPARATOR)
        for document in documents:
            yield from _document(take(document), counts, continues)
            continues = False
        while border := _BORDER.search(text, max(0, LONGEST_CHARACTERS - size)):
            yield from _document(take(text[: border.start()]), counts, continues)
            text, continues = text[border.start() :], True
        # Its end is searched again with the next piece: it may be the start of a separator, or of a border.
        cut = max(0, len(text) - len(SEPARATOR))
        kept.append(text[:cut])
        size, tail = size + cut, text[cut:]
        if size > LONGEST_LINE_CHARACTERS:
            raise UserError(
                f"{segment.path}: {LONGEST_LINE_CHARACTERS} characters with neither {SEPARATOR} nor a space between "
                f"two words: put {SEPARATOR} between documents"
            )
    yield from _document(take(tail), counts, continues)


def _document(text: str, counts: ReadCounts, continues: bool) -> Iterator[str]:
    text = with_unix_line_ends(text)
    if continues:
        if story := text.strip():
            yield Continuation(f" {story}")
    elif story := text.strip():
        counts.documents += 1
        yield story


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
    key = segment.column or "story"
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise UserError(f"{path}: record {number} has no text under {key!r}: {_MEND}")
        yield record[key]


def _jsonl_texts(segment: FileSegment, pieces: Iterator[str]) -> Iterator[str]:
    keys = [segment.column] if segment.column else ["story", "text"]
    for number, line in enumerate(_lines(segment, pieces), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{_line(segment, number)} is not JSON ({error}): {_MEND}") from None
        present = [record[key] for key in keys if key in record] if isinstance(record, dict) else []
        if not present or not isinstance(present[0], str):
            named = " or ".join(map(repr, keys))
            raise UserError(f"{_line(segment, number)} has no text under {named}: {_MEND}, or give column=<its key>")
        yield with_unix_line_ends(present[0])


def _lines(segment: FileSegment, pieces: Iterator[str]) -> Iterator[str]:
    """Yield the lines of a text that comes in pieces."""
    kept = ""
    for piece in pieces:
        text, kept = kept + piece, ""
        if text.endswith("\r"):  # its "\n" may begin the next piece
            text, kept = text[:-1], "\r"
        *lines, last = with_unix_line_ends(text).split("\n")
        kept = last + kept
        yield from lines
        if len(kept) > LONGEST_LINE_CHARACTERS:
            raise UserError(f"{segment.path}: a line of more than {LONGEST_LINE_CHARACTERS} characters: {_MEND}")
    yield from with_unix_line_ends(kept).split("\n")


def _line(segment: FileSegment, number: int) -> str:
    """Name line `number` of a segment by its number in the whole file, as an editor shows it."""
    with open_regular(segment.path, READ_REMEDY) as file:
        before = sum(file.read(min(2**20, segment.start - at)).count(b"\n") for at in range(0, segment.start, 2**20))
    return f"{segment.path}: line {before + number}"


def file_segments(path: Path, every: int, column: str | None = None) -> list[FileSegment]:
    """Divide a .txt or .jsonl file into segments of about `every` bytes; a compressed one is one segment.

    A segment ends behind what divides documents: the separator, or the end of a .jsonl line. Where there is none within
    `every` bytes, a .txt is cut between two words. So the segments hold the same documents as the whole file.
    """
    with read_errors(path, READ_REMEDY):
        size = path.stat().st_size
        if compression_of(path):
            return [FileSegment(path, 0, size, column)]
        cuts = _cuts(path, every, size)
    starts = [(0, False), *cuts]
    stops = [*(at for at, _ in cuts), size]
    return [FileSegment(path, start, stop, column, inside) for (start, inside), stop in zip(starts, stops, strict=True)]


def _cuts(path: Path, every: int, size: int) -> list[tuple[int, bool]]:
    """Return the byte offsets at which a file is cut, and whether each lies inside a document."""
    is_txt = kind_of(path) == ".txt"
    marker = SEPARATOR.encode() if is_txt else b"\n"
    cuts: list[tuple[int, bool]] = []
    with open_regular(path, READ_REMEDY) as file:
        position = every
        while position < size:
            end, inside = _find(file, re.compile(re.escape(marker)), position, every if is_txt else size), False
            if end is None and is_txt:
                end = _find(file, _BORDER_BYTES, position, size, at_start=True)
                inside = end is not None and not _is_behind(file, marker, end)
            if end is None or end >= size:
                break
            cuts.append((end, inside))
            position = end + every
        if cuts and size - cuts[-1][0] <= _BLOCK:
            file.seek(cuts[-1][0])
            if not file.read(_BLOCK).strip():  # white space only: it stays with the part before
                cuts.pop()
    return cuts


def _is_behind(file: BinaryIO, marker: bytes, position: int) -> bool:
    """Return whether the bytes before a position are the marker."""
    file.seek(max(0, position - len(marker)))
    return file.read(min(position, len(marker))) == marker


def _find(file: BinaryIO, pattern: re.Pattern[bytes], position: int, limit: int, at_start: bool = False) -> int | None:
    """Return the offset behind the first match in the `limit` bytes from `position` on, or at its start.

    None: there is no match. A match is at most _OVERLAP bytes long.
    """
    file.seek(position)
    kept, end = b"", position + limit
    while position < end and (block := file.read(_BLOCK)):
        searched = kept + block
        if match := pattern.search(searched):
            return position - len(kept) + (match.start() if at_start else match.end())
        position += len(block)
        kept = searched[-_OVERLAP:]
    return None
