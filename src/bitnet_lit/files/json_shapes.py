"""Shapes say what a caller relies on in JSON that somebody else may have written (foreign_json.py reads it).

    META = Record(
        {"dtype": Choice("uint16", "uint32"), "vocab_size": Integer(1, 2**31 - 1)},
        optional={"shards": MapOf(Record({"tokens": Integer(0, 2**63 - 1)}))},
    )
    META.check(value, "")

A shape checks types and ranges, and that numbers are finite. Keys that it does not name are kept unchecked. `Mismatch`
names the dotted key, what is wrong, and the value (shortened).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

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
