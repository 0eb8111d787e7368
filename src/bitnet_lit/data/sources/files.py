"""Text files are a source, and are cut into shards here.

Each .json file is one shard, as in llama2.c, under the name of the file if it is llama2.c's (data00, data01, ...).
Small .jsonl and .txt files and tables share a shard; large ones are cut between documents. Both kinds give shards of
about SHARD_TEXT_BYTES. A compressed file can be read from its start only, and so goes to one shard as a whole.
Where a data set brings a validation split, that is shard 0, of any size.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from bitnet_lit.data.sources.find_text import FoundText, find_text, joined, kind_of
from bitnet_lit.data.sources.open_text import READ_REMEDY, compression_of
from bitnet_lit.data.sources.read_text import FileSegment, file_segments
from bitnet_lit.data.sources.source import Segment, Source, TextShard, numbered
from bitnet_lit.data.sources.splits import check_one_use, divide
from bitnet_lit.data.sources.tables import TABLES, table_segments
from bitnet_lit.errors import read_errors

SHARD_TEXT_BYTES = 64 * 2**20
COMPRESSION_RATIO = 3  # of English text with gzip (about 2.7) and Zstandard (about 3)


def find_text_of_one_split(source: str, key: str) -> FoundText:
    """Find the text files that a path or a glob means, and make sure that they are of one split of a data set.

    Args:
        key: the option that gave `source`, which an error's line names.

    Raises:
        UserError: there is no text, or there are several splits; one line.
    """
    found = find_text(source, key=key)
    check_one_use(found.files, f"{key}={source}")
    return found


def text_source(source: str, column: str | None, key: str) -> Source:
    """Open a file, a folder or a glob whose text is all measured.

    Args:
        column: the column of a table, or the key of a JSON record, that has the text. None: the usual ones.
        key: the option that gave `source`, which an error's line names.
    """
    found = find_text_of_one_split(source, key)
    return Source(
        _identity(source, column), file_shards(found.files, column), found.files, found.describe_passed_over()
    )


def files_source(sources: Sequence[str], built_in: Sequence[str] = (), column: str | None = None) -> Source:
    """Open files, folders or globs to train on. The validation split of a data set becomes shard 0.

    Args:
        built_in: the names of the built-in sources, which an error's line names too.
        column: as for `text_source`.
    """
    found = joined(find_text(source, built_in) for source in sources or [""])
    splits = divide(found.files)
    for path in splits.left_out:
        found.pass_over(path, f"split {splits.names[path]}")
    identity = "\n".join(_identity(source, column) for source in sources)
    if splits.validation:
        identity += "#splits"  # a folder of an earlier version, which trained on all of them, is not continued
    return Source(
        identity,
        file_shards(splits.training, column, splits.validation),
        [*splits.validation, *splits.training],
        found.describe_passed_over(),
        validation=", ".join(dict.fromkeys(splits.names[path] for path in splits.validation)),
    )


def _identity(source: str, column: str | None) -> str:
    path = os.fsencode(os.path.abspath(source)).decode("utf-8", "backslashreplace")  # a path may be any bytes
    return path if column is None else f"{path}#{column}"


def file_shards(files: Sequence[Path], column: str | None = None, validation: Sequence[Path] = ()) -> list[TextShard]:
    """Cut text files into shards (see the module).

    Args:
        validation: files of a validation split. Their text is the first shard.
    """
    groups = _groups(files, column)
    held_out = [segment for group in _groups(validation, column) for segment in group]
    if held_out:
        return numbered([held_out, *groups])
    return _with_llama2c_names(files, groups) or numbered(groups)


def _groups(files: Sequence[Path], column: str | None) -> list[list[Segment]]:
    """Return the segments of each shard."""
    groups: list[list[Segment]] = []
    open_bytes = SHARD_TEXT_BYTES  # of the group that small files still join; full: the next one begins
    for path in files:
        if kind_of(path) == ".json":
            groups.append([FileSegment(path, 0, _size(path), column)])
            open_bytes = SHARD_TEXT_BYTES
            continue
        for segment in _segments(path, column):
            if open_bytes >= SHARD_TEXT_BYTES:
                groups.append([])
                open_bytes = 0
            groups[-1].append(segment)
            open_bytes += segment.size * (COMPRESSION_RATIO if compression_of(path) else 1)
    return groups


def _segments(path: Path, column: str | None) -> Sequence[Segment]:
    if kind_of(path) in TABLES:
        return table_segments(path, column, SHARD_TEXT_BYTES)
    return file_segments(path, SHARD_TEXT_BYTES, column)


def _with_llama2c_names(files: Sequence[Path], groups: list[list[Segment]]) -> list[TextShard]:
    """Name each shard as its file, where that gives names like llama2.c's, each once; else return no shards."""
    names = [path.stem for path in files]
    paths = [segment.path for group in groups for segment in group if isinstance(segment, FileSegment)]
    one_each = paths == files and len(groups) == len(files)
    if one_each and len(set(names)) == len(names) and all(re.fullmatch(r"data\d+", name) for name in names):
        return [TextShard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]
    return []


def _size(path: Path) -> int:
    with read_errors(path, READ_REMEDY):
        return path.stat().st_size
