"""JSON that somebody else may have written is read and checked here: meta.json, config.json, tokenizer.json, ...

`json.loads` accepts much that its callers do not expect: a number in place of a text, `NaN`, `1e999` (an infinity), a
key that appears twice, half of a surrogate pair (`"\\ud83d"`), which no encoding can hold. It also fails in several
ways: with a `JSONDecodeError`, a `UnicodeDecodeError`, a `ValueError` for a number of more than 4,300 digits, and a
`RecursionError` for deeply nested brackets. Each caller would have to handle all of these. So every file is read here,
once, and checked against a *shape* (json_shapes.py) that says what the caller relies on:

    META = Record({"dtype": Choice("uint16", "uint32"), "vocab_size": Integer(1, 2**31 - 1)})
    meta = read_json(folder / "meta.json", META, "prepare the folder again")

The result is plain data (dict, list, str, int, float, bool, None). Everything that the shape names has been checked:
types, ranges, and that numbers are finite. Keys that the shape does not name are kept unchecked. An error is one line:
the file, the dotted key, what is wrong, the value (shortened), the remedy.

    data/meta.json: shards.data00.bin: must be an object, not 1e-300: prepare the folder again

Memory and recursion are bounded. The size is checked before the file is read, and the depth of nesting before it is
parsed, so the parser and later code may recurse. A byte order mark is allowed; encodings other than UTF-8 are not.
`parse_json` takes JSON text that lies inside another file, such as the metadata of a safetensors header.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitnet_lit.errors import UserError
from bitnet_lit.files.json_shapes import Mismatch, Shape, shown
from bitnet_lit.files.regular_file import read_regular

MAX_BYTES = 2**24  # enough for a file of settings; readers of large files (a tokenizer.json) pass their own limit
MAX_DEPTH = 64  # real files nest less than ten deep


def _decode(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Mismatch("", "not UTF-8 but UTF-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Mismatch("", f"not UTF-8 at byte {error.start}") from None


_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}


def _check_depth(text: str) -> None:
    """Refuse JSON nested deeper than MAX_DEPTH. Each step takes linear time and runs in C."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    without_escapes = text.replace("\\\\", "").replace('\\"', "")
    brackets = re.sub(r'[^][{}"]+|"[^"]*(?:"|\Z)', "", without_escapes)  # brackets outside of strings
    if max(itertools.accumulate(map(_STEP.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise Mismatch("", f"nested more than {MAX_DEPTH} deep")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Mismatch(key, "appears twice")
            seen.add(key)
    return value


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _check_surrogates(text: str, value: Any) -> None:
    """Refuse half of a surrogate pair, which JSON can only write as an escape."""
    if re.search(r"\\u[dD][89a-fA-F]", text):
        for part in _texts(value):
            if re.search("[\ud800-\udfff]", part):
                raise Mismatch("", f"half of a surrogate pair in {shown(part)}")


def parse_json(content: bytes | str, where: object, shape: Shape, remedy: str) -> Any:
    """Parse a JSON text and check its value against a shape.

    Args:
        where: the start of an error message, usually a path.
        remedy: the end of an error message: what the user can do.

    Raises:
        UserError: the text is not JSON, or its value has another shape.
    """
    try:
        text = _decode(content) if isinstance(content, bytes) else content
        _check_depth(text)
        try:
            value = json.loads(text, object_pairs_hook=_without_duplicates)
        except json.JSONDecodeError as error:
            raise Mismatch("", f"not JSON ({error})") from None
        except RecursionError:  # the caller is itself deep in the stack
            raise Mismatch("", "nested too deep") from None
        except Mismatch:
            raise
        except ValueError:  # Python converts at most 4,300 digits, as the time grows with their square
            raise Mismatch("", "a number has too many digits") from None
        _check_surrogates(text, value)
        shape.check(value, "")
    except Mismatch as error:
        raise UserError(f"{where}: {error}: {remedy}") from None
    return value


def read_json(path: Path, shape: Shape, remedy: str, max_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file and check its value against a shape.

    Raises:
        UserError: the same errors as in `parse_json`; or the file is missing, is not a regular file, or is larger than
            `max_bytes`.
    """
    return parse_json(read_regular(path, remedy, max_bytes), path, shape, remedy)
