"""Checks of values: ranges of numbers, declared beside the fields, and names from a list.

Each numeric field of the schema has its `Range` in the class's RANGES, and `Checked` compares all of them when an
object is made: a NaN, an infinity or an absurd number is refused with the key, the value and what it must be, before
anything is computed with it.
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
    """The numbers that a key takes: from `least` to `most`, and `also`.

    Args:
        open_left, open_right: whether the ends themselves are left out.
        also: numbers outside that have a meaning of their own, such as 0 for "off".
        must: what it must, in words; the range otherwise.
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
        """Refuse what is no number of the range.

        Raises:
            UserError: with the key, the value and what it must be.
        """
        if isinstance(value, bool) or not isinstance(value, Real):
            raise UserError(f"{key}={value!r}: must be a number")
        number: Any = value
        above = self.least < number if self.open_left else self.least <= number
        below = number < self.most if self.open_right else number <= self.most
        if not (above and below) and number not in self.also:  # a NaN is neither
            raise UserError(f"{key}={value}: must {self._words(number)}")


SIZE = Range(1, 2**31 - 1)  # elements, layers, processes: what is counted in memory
LENGTH = Range(1, 10**15)  # steps, tokens: what is counted in time
COUNT = Range(0, 10**15)
POSITIVE = Range(1e-30, 1e30, must="be greater than zero, and finite")  # what float32 can hold
FACTOR = Range(0, 1e30, must="be 0 or more, and finite")
SHARE = Range(0, 1)


class Checked:
    """A dataclass of the schema whose numbers are checked when it is made."""

    OWNER: ClassVar[str] = ""
    """The prefix of a key: `model.`, or nothing for a command's own."""
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
    """Each field's type, as a tuple: (int,) for `int`, (int, NoneType) for `int | None`."""
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(cls).items()}


def require_whole(key: str, value: object) -> None:
    """Refuse what is no whole number; True and False are none.

    Raises:
        UserError: with the key and the value.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{key}={value!r}: must be a whole number")


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value}: must be one of {', '.join(allowed)}")


def list_of_texts(key: str, texts: object) -> list[str]:
    """A sequence of texts as a list.

    Raises:
        UserError: a single text, whose characters would be taken for texts, or something that is no text.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise UserError(f"{key}={texts!r:.100}: must be a list of texts")
    listed = list(texts)
    if not all(isinstance(text, str) for text in listed):
        raise UserError(f"{key}={listed!r:.100}: must be a list of texts")
    return listed
