"""A source of text is a list of shards, each made of segments that can be read one by one.

`prepare` writes one file of tokens for each shard of text. A segment is a part that can be read by itself: a whole
.json file, a byte range of a large .txt file, a range of demo stories. Each encoding process reads its own segments, so
no process holds more than one segment's text in memory.

A new source is a function that returns a `Source`, named in the table of `sources/__init__.py`. Text that does not lie
in files also needs a `Segment` of its own.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class ReadCounts:
    """ReadCounts adds up what the readers found in the segments of a shard.

    Attributes:
        bytes_in: bytes of UTF-8.
        documents: records of JSON, and parts of .txt files that hold text.
        empty: documents without text.
        carriage_returns: stories of .json files that hold carriage returns.
    """

    bytes_in: int = 0
    documents: int = 0
    empty: int = 0
    carriage_returns: int = 0


class Continuation(str):
    """The text of a document goes on: a segment that begins inside one, or a part of one that is very long.

    It begins with the space at which the document was cut.
    """

    __slots__ = ()


class Segment(ABC):
    """A segment is a part of a source that can be read by itself, in any process: it is sent there with pickle."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Return how much text it holds, for a progress bar: in any unit that all segments of a source share."""

    @abstractmethod
    def __str__(self) -> str:
        """Name the segment in an error's line: the path of its file."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that changes when the stories change."""

    @abstractmethod
    def stories(self, counts: ReadCounts) -> Iterator[str]:
        """Yield the stories in order, without white space at their ends, and add what was read to `counts`.

        A story that is a `Continuation` goes on with the one before it.
        """


@dataclass(frozen=True)
class TextShard:
    """Describes the text of one shard.

    Attributes:
        name: the file name of the shard without its suffix, such as data00.
        segments: read one after the other.
    """

    name: str
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """The sum of the segments' sizes."""
        return sum(segment.size for segment in self.segments)


@dataclass(frozen=True)
class Source:
    """Describes text to prepare.

    Attributes:
        identity: where the text comes from. A shard folder notes it, and is never continued with another text.
        shards: the first one is for validation; a single one is divided.
        files: the files that are read.
        passed_over: what of a folder or glob is not read, and why, for the user.
        vocab_size: the number of entries of a tokenizer trained on it, unless the user gives one.
        validation: the split of a data set that is the first shard, for the user; empty where there is none.
    """

    identity: str
    shards: Sequence[TextShard]
    files: Sequence[Path] = field(default=())
    passed_over: str = ""
    vocab_size: int = 4096
    validation: str = ""


def numbered(groups: Sequence[Sequence[Segment]]) -> list[TextShard]:
    """Name groups of segments data00, data01 and so on, in order; names of more digits where there are more."""
    width = max(2, len(str(len(groups) - 1)))
    return [TextShard(f"data{number:0{width}d}", tuple(group)) for number, group in enumerate(groups)]


def fingerprint(shards: Sequence[TextShard]) -> str:
    """Return a sha256 in hex that changes when the stories of the shards change."""
    parts = [segment.fingerprint() for shard in shards for segment in shard.segments]
    return hashlib.sha256(os.fsencode("\n".join(parts))).hexdigest()
