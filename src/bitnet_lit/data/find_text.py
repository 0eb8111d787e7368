"""Which files a source means, and which of a folder's files are passed over.

A source is a file, a folder with everything below it, or a glob. A folder holds more than text: pictures, hidden files
of editors and systems, links to files that are there already. What is passed over is counted by reason and named, so
that text is never left out in silence; what should be read and cannot be ends the call instead.

Kinds are asked of os.path, which answers no where `Path` raises an error (a name that is too long, a link to itself).
Links are followed. A link that leads back to a folder above it, and a second name of a file, are passed over, or the
text would be trained on twice.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bitnet_lit.errors import UserError
from bitnet_lit.regular_file import open_regular

SUFFIXES = (".json", ".jsonl", ".txt")
# Of a folder that text and shards share, as llama2.c's do.
OWN_NAMES = ("meta.json", "tokenizer.json", "tokenizer_config.json")
NAMED = 3  # of the files passed over for one reason


@dataclass
class FoundText:
    """The files of a source, sorted, and those passed over, by reason."""

    files: list[Path] = field(default_factory=list)
    passed_over: dict[str, list[Path]] = field(default_factory=dict)

    def pass_over(self, path: Path, reason: str) -> None:
        """Note a file or folder that is not read."""
        self.passed_over.setdefault(reason, []).append(path)

    def describe_passed_over(self) -> str:
        """Numbers, reasons and some names in one line; empty where everything is read."""
        parts = []
        for reason, paths in self.passed_over.items():
            names = ", ".join(_printable(path.name) for path in paths[:NAMED]) + (", ..." if len(paths) > NAMED else "")
            parts.append(f"{reason}: {len(paths)} ({names})")
        return "; ".join(parts)


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def suffix_of(path: Path) -> str:
    """The suffix that says how a file is read; A.TXT is read as a.txt is."""
    return path.suffix.lower()


def find_text(source: str) -> FoundText:
    """The text files that a path or a glob means.

    Raises:
        UserError: nothing there, nothing that can be read as text, or a folder that cannot be listed; one line.
    """
    if not source:
        raise UserError("source is empty: give a file, a folder, a glob, demo or tinystories")
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
            raise UserError(
                f"source={source}: no such file, folder or glob (or name a built-in source: demo, tinystories)"
            )
    for candidate in candidates:
        if suffix_of(candidate) not in SUFFIXES:  # in a folder they are passed over; here they were asked for
            raise UserError(f"{candidate}: cannot read '{candidate.suffix}' files: give {kinds}")
    _keep_each_once(candidates, found)
    if not found.files:
        passed_over = found.describe_passed_over()
        raise UserError(f"source={source}: no {kinds} files in it{': ' if passed_over else ''}{passed_over}")
    return found


def _walk(folder: Path, found: FoundText) -> Iterator[Path]:
    """The text files below a folder; folders that links lead to come last, so that a file's own place counts."""
    waiting: list[Path] = [folder]
    links: list[Path] = []
    seen: set[tuple[int, int]] = set()
    while waiting or links:
        directory = waiting.pop() if waiting else links.pop(0)
        try:
            status = directory.stat()
            entries = sorted(directory.iterdir())
        except OSError as error:
            raise UserError(
                f"{directory}: cannot be read ({error.strerror}): check its permissions, or take it away"
            ) from None
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
            elif path.name in OWN_NAMES:
                found.pass_over(path, "of a shard folder")
            elif suffix_of(path) not in SUFFIXES:
                found.pass_over(path, f"not {', '.join(SUFFIXES)}")
            else:
                yield path


def _keep_each_once(candidates: list[Path], found: FoundText) -> None:
    """Fill `found.files`: sorted, without empty files, and with one name of each file."""
    seen: set[tuple[int, int]] = set()
    for path in sorted(candidates, key=lambda path: (path.is_symlink(), path)):
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): check the file") from None
        identity = (status.st_dev, status.st_ino)
        if not status.st_size:
            found.pass_over(path, "empty")
        elif status.st_ino and identity in seen:  # some network mounts number no files
            found.pass_over(path, "second names of a file")
        else:
            seen.add(identity)
            found.files.append(path)
    found.files.sort()
