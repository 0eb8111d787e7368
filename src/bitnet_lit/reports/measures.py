"""The metric of a run at its end, or at a number of tokens, from metrics.json and the curves in metrics.csv."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_lit.reports.statistics import interpolate
from bitnet_lit.runs.history import DONE, Run


def final(run: Run, metric: str) -> float | None:
    """Return the metric at the end of a run, or as far as the run is; None where it has no finite value."""
    if run.state == DONE and metric in run.figures:
        return run.figures[metric] if math.isfinite(run.figures[metric]) else None
    points = run.curve(metric).finite
    return float(points.values[-1]) if len(points.values) else None


def reached(run: Run, metric: str) -> float | None:
    """Return the tokens at which the metric was measured last; None where the files do not say."""
    if run.tokens_per_step is None:
        return None
    if run.state == DONE and metric in run.figures and run.figures.get("steps", 0) > 0:
        return run.figures["steps"] * run.tokens_per_step
    points = run.curve(metric).finite
    return float(points.steps[-1]) * run.tokens_per_step if len(points.steps) else None


@dataclass(frozen=True)
class Measured:
    """A metric of several runs at one number of tokens.

    Attributes:
        values: the metric of each run that has it there.
        tokens: that number; None where it is not known, and each run has its last value.
        is_interpolated: whether values were interpolated in curves.
    """

    values: dict[Run, float]
    tokens: float | None
    is_interpolated: bool


def at_equal_tokens(runs: Sequence[Run], metric: str) -> Measured:
    """Measure runs at the largest number of tokens that all of them have reached.

    Finished runs of one length have the values of metrics.json, over the whole validation split. Otherwise every value
    is read from the curve, between whose points it is linear in tokens.
    """
    ends = {end for run in runs if (end := reached(run, metric)) is not None}
    are_known = all(run.tokens_per_step is not None for run in runs)
    if len(runs) == 1 or not are_known or (len(ends) == 1 and all(run.state == DONE for run in runs)):
        last = {run: value for run in runs if (value := final(run, metric)) is not None}
        return Measured(last, min(ends) if len(ends) == 1 and are_known else None, False)
    tokens = min(ends, default=0.0)
    values = {}
    for run in runs:
        points = run.curve(metric).finite
        value = interpolate(tokens, points.steps * (run.tokens_per_step or 1), points.values)
        if value is not None:
            values[run] = value
    return Measured(values, tokens, len(ends) > 1)
