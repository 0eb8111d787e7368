"""`find_text` says which files `source=` means, and which files of a folder are passed over.

A source is a file, a folder with everything below it, or a glob. A folder holds more than text: pictures, hidden files
of editors, links to files that are read already. What is passed over is counted by reason and named, so that no text is
left out in silence. A file that should be read and cannot be ends the call.

Links are followed. A link that leads back to a folder above it, and a second name of a file, are passed over, or the
text would be trained on twice. `os.path` says what kind a file is, because it answers no where `Path` raises an error
(a name that is too long, a link to itself).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitnet_lit.data.shard_folder import META_NAME, OWN_JSON_NAMES
from bitnet_lit.data.sources.open_text import compression_of
from bitnet_lit.data.sources.tables import TABLES, has_rows
from bitnet_lit.errors import UserError, list_remedy, nearest, read_errors
from bitnet_lit.files.regular_file import open_regular

SUFFIXES = (".json", ".jsonl", ".txt", *TABLES)  # the first three may be followed by a compression: .txt.gz
# Beside the tables of a folder that `datasets` wrote; and the tables that its `map` keeps for itself.
_DATASETS_NAMES = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_DATASETS_CACHE = re.compile(r"(cache|tmp)-?[0-9a-f]+.*\.arrow")
NAMED = 3  # of the files that are passed over for one reason


@dataclass
class FoundText:
    """Holds the files of a source, sorted, and the files that are passed over, by reason."""

    files: list[Path] = field(default_factory=list)
    passed_over: dict[str, list[Path]] = field(default_factory=dict)

    def pass_over(self, path: Path, reason: str) -> None:
        """Note a file or folder that is not read."""
        self.passed_over.setdefault(reason, []).append(path)

    def describe_passed_over(self) -> str:
        """Return reasons, numbers and some names in one line; an empty text where everything is read."""
        parts = []
        for reason, paths in self.passed_over.items():
            names = ", ".join(_printable(path.name) for path in paths[:NAMED]) + (", ..." if len(paths) > NAMED else "")
            parts.append(f"{reason}: {len(paths)} ({names})")
        return "; ".join(parts)


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def kind_of(path: Path) -> str:
    """Return the suffix that says how a file is read, in lower case: .txt for A.TXT and for a.txt.gz.

    A file of another kind has the suffix that it has; a compressed table has that of its compression.
    """
    compression = compression_of(path)
    inner = path.with_suffix("").suffix.lower() if compression else path.suffix.lower()
    return compression if compression and (inner in TABLES or inner not in SUFFIXES) else inner


_SHARDS = {"source": "train data.dir", "data": "data_dir"}  # what takes a folder of shards, by the key of the text


def find_text(source: str, built_in: Sequence[str] = (), key: str = "source") -> FoundText:
    """Find the text files that a path or a glob means.

    Args:
        built_in: the names of the built-in sources, for the line of an error.
        key: the option that gave `source`, for the line of an error.

    Raises:
        UserError: there is nothing, nothing that can be read as text, or a folder that cannot be listed; one line.
    """
    also = f" (or name a built-in source: {', '.join(built_in)})" if built_in else ""
    if not source:
        raise UserError(f"{key} is empty: give a file, a folder or a glob{also}")
    path = Path(source)
    found = FoundText()
    kinds = ", ".join(SUFFIXES)
    if os.path.isdir(path):
        candidates = list(_walk(path, found))
    elif os.path.lexists(path):
        open_regular(path, f"give a {kinds} file, a folder or a glob").close()
        candidates = [path]
    else:
        candidates = []
        for match in sorted(map(Path, glob.glob(source, recursive=True))):
            if os.path.isfile(match):
                candidates.append(match)
            else:
                found.pass_over(match, "folders" if os.path.isdir(match) else "no files")
        if not candidates and not found.passed_over:
            if "://" in source:
                raise UserError(f"{key}={source}: a URL, and text is read from files: download it first")
            if near := nearest(source, built_in):
                also = f": did you mean {key}={near}?"
            raise UserError(f"{key}={source}: no such file, folder or glob{also}{list_remedy(key, source)}")
    for candidate in candidates:
        if kind_of(candidate) not in SUFFIXES:  # in a folder they are passed over; here they were asked for
            raise UserError(f"{candidate}: cannot read '{candidate.suffix}' files: give {kinds}")
    _keep_each_once(candidates, found)
    if not found.files:
        if candidates == [path]:
            raise UserError(f"{key}={source}: is empty: give a file with text")
        if os.path.isfile(path / META_NAME):
            raise UserError(f"{key}={source}: a folder of shards, and no text: {_SHARDS[key]}={source} reads shards")
        passed_over = found.describe_passed_over()
        raise UserError(f"{key}={source}: no {kinds} files in it{': ' if passed_over else ''}{passed_over}")
    return found


def joined(several: Iterable[FoundText]) -> FoundText:
    """Return what several sources hold, with one name of each file."""
    first, *others = several
    if not others:
        return first
    found = FoundText()
    for each in (first, *others):
        for reason, paths in each.passed_over.items():
            found.passed_over.setdefault(reason, []).extend(paths)
    _keep_each_once([path for each in (first, *others) for path in each.files], found)
    return found


def _walk(folder: Path, found: FoundText) -> Iterator[Path]:
    """Yield the text files below a folder. Folders that links lead to come last, so that a file's own path counts."""
    waiting: list[Path] = [folder]
    links: list[Path] = []
    seen: set[tuple[int, int]] = set()
    while waiting or links:
        directory = waiting.pop() if waiting else links.pop(0)
        with read_errors(directory, "check its permissions, or take it away"):
            status = directory.stat()
            entries = sorted(directory.iterdir())
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            found.pass_over(directory, "links to folders read already")
            continue
        seen.add(identity)
        for path in entries:
            if path.name.startswith("."):
                found.pass_over(path, "hidden")
            elif os.path.isdir(path):
                (links if path.is_symlink() else waiting).append(path)
            elif not os.path.isfile(path):
                found.pass_over(path, "no files")
            elif path.name in OWN_JSON_NAMES:  # llama2.c keeps text and shards in one folder
                found.pass_over(path, "of a shard folder")
            elif path.name in _DATASETS_NAMES or _DATASETS_CACHE.fullmatch(path.name):
                found.pass_over(path, "of a folder of datasets")
            elif kind_of(path) not in SUFFIXES:
                found.pass_over(path, f"not {', '.join(SUFFIXES)}")
            else:
                yield path


def _keep_each_once(candidates: list[Path], found: FoundText) -> None:
    """Fill `found.files` with the candidates: sorted, none without content, and with one name of each file."""
    seen: set[tuple[int, int]] = set()
    for path in sorted(candidates, key=lambda path: (path.is_symlink(), path)):
        with read_errors(path, "check the file"):
            status = path.stat()
        identity = (status.st_dev, status.st_ino)
        if not status.st_size:
            found.pass_over(path, "empty")
        elif status.st_ino and identity in seen:  # some network mounts number no files
            found.pass_over(path, "second names of a file")
        elif kind_of(path) in TABLES and not has_rows(path):  # as the hub has them for an empty split
            found.pass_over(path, "without rows")
        else:
            seen.add(identity)
            found.files.append(path)
    found.files.sort()
