"""These checks validate the values of the schema: ranges of numbers, and names from a list.

Each numeric field of the schema has its `Range` in RANGES of its class. `Checked` compares every number with its range
when an object is made. So a NaN, an infinity or an absurd number is refused before anything is computed with it, with
an error that has the key, the value and what it must be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar, get_args, get_type_hints

from bitnet_lit.errors import UserError


@dataclass(frozen=True)
class Range:
    """A Range has the numbers that a key accepts: those from `least` to `most`, and those in `also`.

    Args:
        open_left, open_right: whether `least` or `most` itself is refused.
        also: numbers outside the range that have a meaning of their own, such as 0 for "off".
        must: the words after "must" in the error; empty: words made from the range.
    """

    least: float
    most: float
    open_left: bool = False
    open_right: bool = False
    also: tuple[float, ...] = ()
    must: str = ""

    def _words(self, value: float) -> str:
        if self.must:
            return self.must
        if isinstance(value, float) and not math.isfinite(value):
            return "be a finite number"
        if self.most <= 2**16:
            left, right = "(" if self.open_left else "[", ")" if self.open_right else "]"
            return f"lie in {left}{self.least}, {self.most}{right}"
        if value > self.most:
            return f"be at most {self.most}"
        if self.least == 0 and not self.open_left:
            return "be 0 or more"
        return "be greater than zero" if 0 <= self.least <= 1 else f"be {self.least} or more"

    def check(self, key: str, value: Any) -> None:
        """Refuse a value that is not a number of the range.

        Raises:
            UserError: `value` is not a number, or is outside the range.
        """
        if isinstance(value, bool) or not isinstance(value, Real):
            raise UserError(f"{key}={value!r}: must be a number")
        number: Any = value
        above = self.least < number if self.open_left else self.least <= number
        below = number < self.most if self.open_right else number <= self.most
        if not (above and below) and number not in self.also:  # every comparison with a NaN is false
            raise UserError(f"{key}={value}: must {self._words(number)}")


SIZE = Range(1, 2**31 - 1)  # elements, layers, processes: numbers of things that are in memory at the same time
LENGTH = Range(1, 10**15)  # steps, tokens: numbers of things that follow each other
COUNT = Range(0, 10**15)
POSITIVE = Range(1e-30, 1e30, must="be greater than zero, and finite")  # what float32 can hold
FACTOR = Range(0, 1e30, must="be 0 or more, and finite")
SHARE = Range(0, 1)


class Checked:
    """Dataclasses of the schema derive from Checked, which checks their numbers when an object is made.

    Raises:
        UserError: a number is outside its range, or a value is not a number.
    """

    OWNER: ClassVar[str] = ""
    """The prefix of its keys on the command line, such as `model.`; empty for the keys of a command itself."""
    RANGES: ClassVar[dict[str, Range]] = {}
    """The range of each numeric field."""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        kinds = _kinds_of_fields(cls)
        for key, allowed in self.RANGES.items():
            name, value, kinds_of_key = f"{self.OWNER}{key}", getattr(self, key), kinds[key]
            if value is None and type(None) in kinds_of_key:
                continue
            if float not in kinds_of_key:
                require_whole(name, value)
            allowed.check(name, value)


@cache
def _kinds_of_fields(cls: type) -> dict[str, tuple[type, ...]]:
    """Return the types that each field accepts: (int,) for `int`, (int, NoneType) for `int | None`."""
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(cls).items()}


def require_whole(key: str, value: object) -> None:
    """Refuse a value that is not a whole number. True and False are refused too.

    Raises:
        UserError: `value` is not an integer.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{key}={value!r}: must be a whole number")


def written(value: object) -> str:
    """Return a value as it is written on a command line: true, false or null where it is no number or text."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def not_empty(key: str, path: str | None) -> None:
    """Refuse an empty path, which a shell makes of a variable without a value: it would be the current folder.

    Raises:
        UserError: `path` is empty.
    """
    if path == "":
        raise UserError(f"{key}= is empty: give a path, or leave it out")


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value}: must be one of {', '.join(allowed)}")


def list_of_texts(key: str, texts: object) -> list[str]:
    """Return texts as a list.

    Raises:
        UserError: `texts` is a single text, which would count as a list of its characters, or an element is not a text.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise UserError(f"{key}={texts!r:.100}: must be a list of texts")
    listed = list(texts)
    if not all(isinstance(text, str) for text in listed):
        raise UserError(f"{key}={listed!r:.100}: must be a list of texts")
    return listed
