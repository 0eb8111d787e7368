"""JSON that somebody else may have written is read and checked here: meta.json, config.json, tokenizer.json, ...

`json.loads` accepts much that its callers do not expect: a number in place of a text, `NaN`, `1e999` (an infinity), a
key that appears twice, half of a surrogate pair (`"\\ud83d"`), which no encoding can hold. It also fails in several
ways: with a `JSONDecodeError`, a `UnicodeDecodeError`, a `ValueError` for a number of more than 4,300 digits, and a
`RecursionError` for deeply nested brackets. Each caller would have to handle all of these. So every file is read here,
once, and checked against a *shape* that says what the caller relies on:

    META = Record(
        {"dtype": Choice("uint16", "uint32"), "vocab_size": Integer(1, 2**31 - 1)},
        optional={"shards": MapOf(Record({"tokens": Integer(0, 2**63 - 1)}))},
    )
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
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bitnet_lit.errors import UserError
from bitnet_lit.regular_file import read_regular

MAX_BYTES = 2**24  # enough for a file of settings; readers of large files (a tokenizer.json) pass their own limit
MAX_DEPTH = 64  # real files nest less than ten deep
SHOWN_CHARACTERS = 60


class Mismatch(ValueError):
    """Reports a value that does not have its shape: the dotted key and what is wrong."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(f"{_printable(key)}: {what}" if key else what)


class Shape(Protocol):
    """Describes which JSON values are allowed."""

    def check(self, value: Any, key: str) -> None:
        """Raise `Mismatch` if `value`, found under the dotted `key`, does not have this shape."""


@dataclass(frozen=True)
class Anything:
    """Allows every JSON value."""

    def check(self, value: Any, key: str) -> None:
        """Accept the value."""


@dataclass(frozen=True)
class Integer:
    """Allows a whole number from `low` to `high`, both included; `true` and `false` are not numbers."""

    low: int
    high: int

    def check(self, value: Any, key: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Mismatch(key, f"must be a whole number, not {shown(value)}")
        if not self.low <= value <= self.high:
            borders = f"from {self.low} to {self.high}" if self.low < self.high else str(self.low)
            raise Mismatch(key, f"must be {borders}, not {shown(value)}")


@dataclass(frozen=True)
class Number:
    """Allows a finite number from `low` to `high`, both included; with `exclusive_low`, `low` itself is refused."""

    low: float = -math.inf
    high: float = math.inf
    exclusive_low: bool = False

    def check(self, value: Any, key: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Mismatch(key, f"must be a number, not {shown(value)}")
        try:
            finite = math.isfinite(value)
        except OverflowError:  # a whole number too large for a float
            finite = False
        if not finite:
            raise Mismatch(key, f"must be a finite number, not {shown(value)}")
        if value < self.low or value > self.high or (self.exclusive_low and value == self.low):
            if self.high == math.inf:
                border = f"above {self.low}" if self.exclusive_low else f"at least {self.low}"
            elif self.low == -math.inf:
                border = f"at most {self.high}"
            else:
                border = f"{'above' if self.exclusive_low else 'from'} {self.low} to {self.high}"
            raise Mismatch(key, f"must be {border}, not {shown(value)}")


@dataclass(frozen=True)
class Flag:
    """Allows `true` and `false`."""

    def check(self, value: Any, key: str) -> None:
        if not isinstance(value, bool):
            raise Mismatch(key, f"must be true or false, not {shown(value)}")


@dataclass(frozen=True)
class Text:
    """Allows a text; with `pattern`, the regular expression must match the whole text. `called` names it in errors."""

    pattern: str | None = None
    called: str = "text"

    def check(self, value: Any, key: str) -> None:
        if not isinstance(value, str) or (self.pattern is not None and not re.fullmatch(self.pattern, value)):
            raise Mismatch(key, f"must be {self.called}, not {shown(value)}")


SHA256 = Text("[0-9a-f]{64}", "a sha256 in hex")


class Choice:
    """Allows the given texts."""

    def __init__(self, *values: str) -> None:
        self.values = values

    def check(self, value: Any, key: str) -> None:
        if not isinstance(value, str) or value not in self.values:
            raise Mismatch(key, f"must be {' or '.join(self.values)}, not {shown(value)}")


class Either:
    """Allows a value of any of several shapes; `called` names them all in the error."""

    def __init__(self, *shapes: Shape, called: str) -> None:
        self.shapes, self.called = shapes, called

    def check(self, value: Any, key: str) -> None:
        for shape in self.shapes:
            try:
                return shape.check(value, key)
            except Mismatch:
                continue
        raise Mismatch(key, f"must be {self.called}, not {shown(value)}")


@dataclass(frozen=True)
class OrNull:
    """Allows `null` and values of `shape`."""

    shape: Shape

    def check(self, value: Any, key: str) -> None:
        if value is not None:
            self.shape.check(value, key)


@dataclass(frozen=True)
class ListOf:
    """Allows a list whose items all have `shape`; if `length` is given, the list must have that many items."""

    shape: Shape
    length: int | None = None

    def check(self, value: Any, key: str) -> None:
        if not isinstance(value, list):
            raise Mismatch(key, f"must be a list, not {shown(value)}")
        if self.length is not None and len(value) != self.length:
            raise Mismatch(key, f"must be a list of {self.length}, not of {len(value)}")
        for index, item in enumerate(value):
            self.shape.check(item, f"{key}[{index}]")


@dataclass(frozen=True)
class MapOf:
    """Allows an object with any keys whose values all have `shape`."""

    shape: Shape

    def check(self, value: Any, key: str) -> None:
        _check_object(value, key)
        for name, item in value.items():
            self.shape.check(item, _join(key, name))


@dataclass(frozen=True)
class Record:
    """Allows an object with all keys of `required` and any of `optional`; values of other keys are not checked."""

    required: Mapping[str, Shape] = field(default_factory=dict)
    optional: Mapping[str, Shape] = field(default_factory=dict)

    def check(self, value: Any, key: str) -> None:
        _check_object(value, key)
        for name, shape in self.required.items():
            if name not in value:
                raise Mismatch(_join(key, name), "is missing")
            shape.check(value[name], _join(key, name))
        for name, shape in self.optional.items():
            if name in value:
                shape.check(value[name], _join(key, name))


def _check_object(value: Any, key: str) -> None:
    if not isinstance(value, dict):
        raise Mismatch(key, f"must be an object, not {shown(value)}")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def shown(value: Any) -> str:
    """Describe a JSON value for an error message: short, printable, on one line."""
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = json.dumps(value[:SHOWN_CHARACTERS]) if isinstance(value, str) else json.dumps(value)
    return _shortened(text)


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _printable(key: str) -> str:
    """Shorten a key for an error message, and escape control characters and others that cannot be printed."""
    return _shortened(key if key.isprintable() else json.dumps(key)[1:-1])


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
