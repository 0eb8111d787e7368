"""This module decides where an export is written, and what it may replace there.

An export leaves a note: `export.json` in a folder, `<name>.json` beside a file. The note lists the written files with
their sizes and sha256. When a folder is exported to again, exactly those files are replaced. What the user has put
there since (a README.md, a .git) stays. A note that does not belong to the file beside it is recognized too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitnet_lit.checkpoints.file_names import NOTE_NAME
from bitnet_lit.checkpoints.formats.format import Format, formats
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.errors import UserError
from bitnet_lit.files.atomic import atomic_file, atomic_folder, real_path, sync
from bitnet_lit.files.foreign_json import read_json
from bitnet_lit.files.json_shapes import SHA256, Integer, MapOf, Record, Text

NOTE = Record({"format": Text()}, {"files": MapOf(Record({"bytes": Integer(0, 2**63), "sha256": SHA256}))})


def stem_of(path: Path) -> str:
    """Return the name of a model without a file's suffix; a folder's name is kept whole, because it may hold a dot."""
    return path.name if path.is_dir() else path.stem


def default_out(format: Format, path: Path) -> Path:
    """Return the path used without out=: beside the model, or in the current folder for a model in the hub's cache."""
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return Path(f"{path.parent.parent.name.split('--')[-1]}-{format.suffix}")
    return path.with_name(f"{stem_of(path)}-{format.suffix}")


def given_out(out: str) -> Path:
    """Return the path given by out=, with a leading ~ replaced by the home folder: not every shell does that."""
    return Path(os.path.expanduser(out)) if out.startswith("~/") else Path(out)


def note_of(out: Path, is_file: bool) -> Path:
    """Return the path of the note that belongs to an export at `out`."""
    return out.with_name(f"{out.name}.json") if is_file else out / NOTE_NAME


def _read_note(path: Path) -> dict[str, Any] | None:
    """Read the note of an export; return None where there is none, or another file has that name."""
    try:
        note: dict[str, Any] = read_json(path, NOTE, "")
    except UserError:
        return None
    # A note without a list of files is from the first version, which had only the built-in formats.
    return note if "files" in note or note["format"] in formats().names else None


def exported_names(folder: Path) -> set[str]:
    """Return the names in a folder that an earlier export wrote."""
    note = _read_note(folder / NOTE_NAME) or {}
    if "files" in note:
        return {NOTE_NAME, *note["files"]}
    earlier = formats().named(note["format"]).earlier_names(folder) if note else set()
    return {NOTE_NAME, *earlier}


def check_out(out: Path, stored: StoredModel, format: Format) -> None:
    """Refuse to overwrite anything but an export, before anything is converted.

    Raises:
        UserError: something else lies at `out`, or the note's name is taken.
    """
    remedy, is_file = "choose another out=", format.is_file
    if out.exists() and os.path.samefile(out, stored.path):
        raise UserError(f"out={out}: is the model itself: {remedy}")
    if is_file and out.is_dir():
        raise UserError(
            f"out={out}: is a folder, and this format writes a file: choose another out=, such as "
            f"out={out}/{stem_of(stored.path)}{format.extension}"
        )
    if not is_file and out.is_file():
        raise UserError(f"out={out}: is a file, and this format writes a folder: {remedy}")
    try:
        real_path(out, folder=not is_file)
    except UserError as error:
        raise UserError(f"out={error}") from None
    note = note_of(out, is_file)
    noted = _read_note(note)
    if is_file and out.exists() and not (format.recognizes(out) or out.name in (noted or {}).get("files", {})):
        raise UserError(f"out={out}: is a file, but not {format.title}: {remedy}")
    if is_file and os.path.lexists(note) and noted is None:
        raise UserError(f"out={out}: the note of the export goes to {note}, which no export wrote: {remedy}")
    if out.is_dir() and noted is None and any(out.iterdir()):
        raise UserError(f"out={out}: a folder that no export wrote: {remedy}")


def described_files(out: Path) -> dict[str, dict[str, Any]]:
    """Return the size in bytes and the sha256 of an exported file, or of each file in an exported folder, by name."""
    described = {}
    for path in sorted(out.iterdir()) if out.is_dir() else [out]:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
        described[path.name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return described


@contextlib.contextmanager
def replaced(out: Path, is_file: bool) -> Iterator[tuple[Path, Path]]:
    """Yield temporary paths for an export and its note; they replace what is at `out` unless the block raises.

    A file and the note beside it take two renames. The old note is deleted before the first of them, so that a kill in
    between can leave a file without a note, but never a file with the note of another.
    """
    if not is_file:
        with atomic_folder(out, exported_names) as temporary:
            yield temporary, temporary / NOTE_NAME
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    note = note_of(out, is_file)
    with atomic_file(note) as text, atomic_file(out) as temporary:
        yield temporary, text
        sync(temporary)  # a full disk raises here, while the old note still exists
        sync(text)
        note.unlink(missing_ok=True)
