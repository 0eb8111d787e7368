"""Means with 95 % intervals over few runs, and the interpolation of a curve.

The interval is Student's: mean +- t * s / sqrt(n), where s is the standard deviation of the n values (with n - 1) and t
the 97.5 % quantile of Student's distribution with n - 1 degrees of freedom. It holds for values that scatter like a
normal distribution. With n = 2 it is wide (t = 12.7), as two runs say little about their scatter.

The core installation has no library with that quantile. For whole degrees of freedom its distribution is a finite sum
(Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4), which is inverted by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def within(t: float, degrees: int) -> float:
    """Return the probability that a variable with Student's distribution lies within -t and t."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def quantile_975(degrees: int) -> float:
    """Return the t between whose two signs 95 % of Student's distribution lies."""
    low, high = 0.0, 13.0  # 12.706 for one degree of freedom, and less for more
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, degrees) < 0.95 else (low, middle)
    return high


@dataclass(frozen=True)
class Estimate:
    """A mean over runs.

    Attributes:
        half_width: half of the 95 % interval; None for a single value.
        count: the number of values.
    """

    mean: float
    half_width: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Make the estimate from at least one value."""
        count, mean = len(values), math.fsum(values) / len(values)
        if count == 1:
            return cls(mean, None, 1)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean, quantile_975(count - 1) * math.sqrt(variance / count), count)


def interpolate(x: float, xs: np.ndarray, ys: np.ndarray) -> float | None:
    """Return the value of a curve at x, linear between its points; None outside of them.

    Args:
        xs: float (N,), rising.
        ys: float (N,).
    """
    if not len(xs) or not xs[0] <= x <= xs[-1]:
        return None
    return float(np.interp(x, xs, ys))
