"""Sources of text, cut into shards.

A shard is a list of segments, a segment is a part of a source that can be read by itself (a whole JSON file, a byte
range of a large .jsonl or .txt file, a range of demo stories). So every process reads its own text, and no process
ever holds more than a shard's.

A .json file is one shard, as llama2.c does it. Small .jsonl and .txt files share a shard, large ones are cut at
document borders, at about SHARD_TEXT_BYTES.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bitnet_lit.data.find_text import suffix_of
from bitnet_lit.data.stories import READ_REMEDY, Segment, document_ends
from bitnet_lit.errors import UserError

SHARD_TEXT_BYTES = 64 * 2**20
DEMO_VALIDATION_SHARE = 0.02


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


def file_shards(files: list[Path]) -> list[ShardPlan]:
    """Shards of text files: each .json file its own, the others grouped and cut (see the module)."""
    groups: list[list[Segment]] = []
    open_bytes = SHARD_TEXT_BYTES  # of the group that small files still join; full: the next one begins
    for path in files:
        if suffix_of(path) == ".json":
            groups.append([Segment(path, 0, _size(path))])
            open_bytes = SHARD_TEXT_BYTES
            continue
        start = 0
        for stop in document_ends(path, SHARD_TEXT_BYTES):
            if open_bytes >= SHARD_TEXT_BYTES:
                groups.append([])
                open_bytes = 0
            groups[-1].append(Segment(path, start, stop))
            open_bytes += stop - start
            start = stop
    names = [path.stem for path in files]
    # llama2.c's names are kept where they name one shard each; files of several folders may share a name.
    one_each = len(groups) == len(files) and [segment.path for group in groups for segment in group] == files
    if one_each and len(set(names)) == len(names) and all(re.fullmatch(r"data\d+", name) for name in names):
        return [ShardPlan(f"{name}.bin", tuple(group)) for name, group in zip(names, groups, strict=True)]
    width = max(2, len(str(len(groups) - 1)))
    return [ShardPlan(f"data{i:0{width}d}.bin", tuple(group)) for i, group in enumerate(groups)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {READ_REMEDY}") from None
