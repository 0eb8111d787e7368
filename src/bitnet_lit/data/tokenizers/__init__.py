"""All tokenizers have one interface (`tokenizer.py`), and each kind has one file here."""

from __future__ import annotations

import os
from pathlib import Path

from bitnet_lit.data.tokenizers.sentencepiece import SentencePieceTokenizer
from bitnet_lit.data.tokenizers.tokenizer import TextEncoder, Tokenizer
from bitnet_lit.data.tokenizers.tokenizer_json import JsonTokenizer
from bitnet_lit.errors import UserError

__all__ = [
    "FILE_NAMES",
    "TextEncoder",
    "Tokenizer",
    "find_tokenizer",
    "missing_before",
    "open_tokenizer",
    "tokenizer_file_names",
]

_KINDS = (SentencePieceTokenizer, JsonTokenizer)  # where a folder holds files of both, the first kind counts
FILE_NAMES = tuple(name for kind in _KINDS for name in kind.file_names)
"""The names of the files of all kinds."""


def open_tokenizer(path: Path | str) -> Tokenizer:
    """Open a tokenizer's file: *.json as a tokenizer.json, any other name as a SentencePiece model.

    Args:
        path: the file, or a folder that holds one, such as a model folder.

    Raises:
        UserError: the file is missing, cannot be read, or is not what its name says; one line.
    """
    file = find_tokenizer(Path(path)) if os.path.isdir(path) else Path(path)
    if file is None:
        names = " or ".join(kind.file_names[0] for kind in _KINDS)
        raise UserError(f"tokenizer {path}: no {names} in this folder: give the tokenizer's file")
    return JsonTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)


def find_tokenizer(folder: Path) -> Path | None:
    """Return the tokenizer's file in a folder; None where there is none."""
    names = (kind.file_names[0] for kind in _KINDS)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def missing_before(file: Path) -> str | None:
    """Return the name of the file that `find_tokenizer` would have taken before `file`; None where there is none."""
    names = [kind.file_names[0] for kind in _KINDS]
    before = names[: names.index(file.name)] if file.name in names else []
    return next((name for name in before if not (file.parent / name).is_file()), None)


def tokenizer_file_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that the tokenizer of a folder consists of; none where there is no tokenizer."""
    found = find_tokenizer(folder)
    return next((kind.file_names for kind in _KINDS if found and kind.file_names[0] == found.name), ())
