"""The data of report.html, as plain data that becomes JSON: rows, runs with their curves, and ternary health.

Curves have at most `MOST_POINTS` points, so that a page of hundreds of runs opens. The extremes of each piece of a
curve are kept, and its ends.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from bitnet_lit.errors import one_line
from bitnet_lit.reports.comparison import Comparison, Row
from bitnet_lit.reports.gaps import Gap
from bitnet_lit.reports.health import read_matrices
from bitnet_lit.reports.measures import final
from bitnet_lit.reports.statistics import Estimate
from bitnet_lit.runs.config_keys import value_of
from bitnet_lit.runs.history import UNFINISHED, Curve, Run

MOST_POINTS = 500
_MOST_CELLS = 400_000  # of all heat maps of a page; a cell is about six bytes
_TERNARY = ("minus", "zero", "plus", "flip_rate", "weight_scale")


def thinned(values: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """Return the indices of the points to draw: the ends, and the least and the largest value of each piece."""
    count = len(values)
    if count <= most:
        return np.arange(count)
    borders = np.linspace(1, count - 1, (most - 2) // 2 + 1).astype(int)
    low, high = np.where(np.isnan(values), np.inf, values), np.where(np.isnan(values), -np.inf, values)
    pieces = list(itertools.pairwise(borders))
    kept = [start + np.argmin(low[start:end]) for start, end in pieces]
    kept += [start + np.argmax(high[start:end]) for start, end in pieces]
    return np.unique([0, *kept, count - 1])


def numbers(values: np.ndarray | list[float]) -> list[float | None]:
    """Return numbers with five digits; None in place of those that are not finite, which JSON cannot hold."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]


def _curve(run: Run, curve: Curve) -> dict[str, Any]:
    at = thinned(curve.values)
    steps = curve.steps[at]
    seconds = run.seconds_at(steps)
    return {
        "steps": steps.tolist(),
        "values": numbers(curve.values[at]),
        "seconds": None if seconds is None else numbers(seconds),
    }


def _estimate(estimate: Estimate | None) -> list[float | None] | None:
    return None if estimate is None else [estimate.mean, estimate.half_width, estimate.count]


def _gap(gap: Gap) -> dict[str, Any]:
    return {"estimate": _estimate(gap.estimate), "why": gap.why_not}


def _run(run: Run, index: int, label: str, comparison: Comparison) -> dict[str, Any]:
    names = dict.fromkeys([comparison.metric, "train/loss"])
    seconds = run.seconds.values
    return {
        "row": index,
        "label": label,
        "tokensPerStep": run.tokens_per_step,
        "final": final(run, comparison.metric),
        "seconds": float(seconds[-1]) if len(seconds) else None,
        "curves": {name: _curve(run, run.curve(name)) for name in names if len(run.curve(name).steps)},
    }


def _row(row: Row, quant: str, rest: str) -> dict[str, Any]:
    sizes = row.sizes
    return {
        "name": row.name,
        "quant": quant,
        "rest": rest,
        "dense": row.is_dense,
        "loss": _estimate(row.loss),
        "bits": None if sizes is None else sizes.bits_per_weight,
        "bytes": None if sizes is None else sizes.num_bytes,
        "parameters": None if sizes is None else sizes.parameters,
        "seconds": row.seconds,
        "tokensGap": _gap(row.at_equal_tokens),
        "bytesGap": _gap(row.at_equal_bytes),
    }


def _health(run: Run, name: str, most_steps: int) -> dict[str, Any] | None:
    """Return the health of one run; None where nothing is quantized in it."""
    curves = {figure: run.curve(f"ternary/{figure}") for figure in _TERNARY}
    matrices = read_matrices(run.folder, most_steps)
    if not len(curves["zero"].steps):
        return None
    health: dict[str, Any] = {"name": name, "tokensPerStep": run.tokens_per_step}
    for figure, curve in curves.items():
        health[figure] = _curve(run, curve)
    if matrices is not None:
        figures = {figure: [numbers(line) for line in values] for figure, values in matrices.figures.items()}
        health["matrices"] = {"names": matrices.names, "steps": matrices.steps.tolist(), **figures}
    return health


def page_data(comparison: Comparison) -> dict[str, Any]:
    """Return the data of a page."""
    rows, runs, health = [], [], []
    quantized = [row for row in comparison.rows if row.counted and not row.is_dense]
    for index, row in enumerate(comparison.rows):
        runs_of_row = row.counted or [run for run, _ in row.left_out]
        quant = value_of(runs_of_row[0].config, "quant")
        others = [value for key, value in row.values.items() if key.partition(".")[0] != "quant"]
        rows.append(_row(row, quant, " ".join(others)))
        on_their_way = [run for run, _ in row.left_out if run.state == UNFINISHED]
        for run in row.counted or on_their_way:
            label = ", ".join(f"{key} {value_of(run.config, key)}" for key in comparison.over) or run.folder.name
            runs.append(_run(run, index, one_line(label, 200), comparison))
        if row in quantized:
            num_matrices = 210  # a model of 30 layers
            most_steps = max(8, min(60, _MOST_CELLS // (len(quantized) * num_matrices * 3)))
            if each := _health(row.counted[0], row.name, most_steps):
                health.append(each)
    return {"metric": comparison.metric, "rows": rows, "runs": runs, "health": health}
