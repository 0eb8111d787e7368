"""Text files are a source, and are cut into shards here.

Each .json file is one shard, as in llama2.c, under the name of the file if it is llama2.c's (data00, data01, ...).
Small .jsonl and .txt files share a shard; large ones are cut between documents. Both kinds give shards of about
SHARD_TEXT_BYTES.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from bitnet_lit.data.sources.find_text import find_text, suffix_of
from bitnet_lit.data.sources.read_text import READ_REMEDY, FileSegment, document_ends
from bitnet_lit.data.sources.source import Source, TextShard, numbered
from bitnet_lit.errors import UserError

SHARD_TEXT_BYTES = 64 * 2**20


def files_source(source: str, built_in: Sequence[str]) -> Source:
    """Open a file, a folder or a glob.

    Args:
        built_in: the names of the built-in sources, which an error's line names too.
    """
    found = find_text(source, built_in)
    identity = os.fsencode(os.path.abspath(source)).decode("utf-8", "backslashreplace")  # a path may be any bytes
    return Source(identity, file_shards(found.files), found.files, found.describe_passed_over())


def file_shards(files: Sequence[Path]) -> list[TextShard]:
    """Cut text files into shards (see the module)."""
    groups: list[list[FileSegment]] = []
    open_bytes = SHARD_TEXT_BYTES  # of the group that small files still join; full: the next one begins
    for path in files:
        if suffix_of(path) == ".json":
            groups.append([FileSegment(path, 0, _size(path))])
            open_bytes = SHARD_TEXT_BYTES
            continue
        start = 0
        for stop in document_ends(path, SHARD_TEXT_BYTES):
            if open_bytes >= SHARD_TEXT_BYTES:
                groups.append([])
                open_bytes = 0
            groups[-1].append(FileSegment(path, start, stop))
            open_bytes += stop - start
            start = stop
    return _with_llama2c_names(files, groups) or numbered(groups)


def _with_llama2c_names(files: Sequence[Path], groups: list[list[FileSegment]]) -> list[TextShard]:
    """Name each shard as its file, where that gives names like llama2.c's, each once; else return no shards."""
    names = [path.stem for path in files]
    one_each = [segment.path for group in groups for segment in group] == files and len(groups) == len(files)
    if one_each and len(set(names)) == len(names) and all(re.fullmatch(r"data\d+", name) for name in names):
        return [TextShard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]
    return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {READ_REMEDY}") from None
