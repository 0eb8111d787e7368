"""Counts, bytes and lengths of time are shown here with three digits and a unit."""

from __future__ import annotations

from collections.abc import Sequence

from bitnet_lit.runs.config_keys import ABSENT

_ROUNDS_UP = 0.9995  # of a unit: three digits of it, or more, are "1"


def _with_unit(number: float, units: Sequence[tuple[str, float]]) -> str:
    """Return a number as text in the largest unit of which it has one or more, else in the smallest.

    Args:
        units: their names and sizes, the largest one first.
    """
    unit, size = next((each for each in units if number >= _ROUNDS_UP * each[1]), units[-1])
    share = number / size
    return f"{share:.3g} {unit}".rstrip() if share < 1000 * _ROUNDS_UP else f"{share:,.0f} {unit}".rstrip()


def amount(number: float | None) -> str:
    """Return a count with k, M or G."""
    return ABSENT if number is None else _with_unit(number, (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)))


def duration(seconds: float | None) -> str:
    """Return a length of time in seconds, minutes or hours."""
    return ABSENT if seconds is None else _with_unit(seconds, (("h", 3600), ("min", 60), ("s", 1)))


def megabytes(num_bytes: float) -> str:
    """Return bytes as text in kB, MB or GB of 1000."""
    return _with_unit(num_bytes, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)))
