"""Values that are NaN or infinite are counted here, in one pass over memory where there are none."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

CHECKED_AT_ONCE = 2**18  # values; they stay in the CPU's cache between the passes of a check


def count_not_finite(values: NDArray[Any]) -> int:
    """Return how many values are NaN or infinite.

    Args:
        values: float32, or bfloat16 as its bits (uint16).
    """
    count = 0
    flat = values.reshape(-1)
    with np.errstate(all="ignore"):
        for start in range(0, flat.size, CHECKED_AT_ONCE):
            part = flat[start : start + CHECKED_AT_ONCE]
            if part.dtype == np.uint16:
                count += int(np.count_nonzero((part & 0x7F80) == 0x7F80))
            elif not np.isfinite(part.sum()):  # one pass; a sum of large numbers may overflow too
                count += int(np.count_nonzero(~np.isfinite(part)))
    return count
