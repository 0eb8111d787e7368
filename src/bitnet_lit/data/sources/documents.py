"""Every kind of file divides documents in the same way, and does the same to their texts."""

from __future__ import annotations

from collections.abc import Iterator

from bitnet_lit.data.sources.source import ReadCounts
from bitnet_lit.data.tokenizers.tokenizer import without_surrogates

SEPARATOR = "<|endoftext|>"


def documents_of_record(text: str, counts: ReadCounts) -> Iterator[str]:
    """Yield the documents in the text of a record (of JSON, of a table), which is counted as one, or as empty."""
    stories = [part.strip() for part in without_surrogates(text).split(SEPARATOR)]
    counts.documents += 1
    counts.empty += not any(stories)
    yield from (story for story in stories if story)


def with_unix_line_ends(text: str) -> str:
    """Return a text with "\\n" for each "\\r\\n" and "\\r"."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
