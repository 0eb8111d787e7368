"""`compare` turns runs into the rows of a report.

A row holds the runs that agree in the `by` keys. Its loss is the mean over them, which differ in the `over` keys (the
seed). Finished runs count. Where a row has none, the unfinished ones count as far as they are. Runs that failed or
whose loss is not a number never count, and each run that does not count is named with the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bitnet_lit.reports.gaps import Gap, gap_at_equal_bytes, gap_at_equal_tokens
from bitnet_lit.reports.measures import at_equal_tokens, final
from bitnet_lit.reports.statistics import Estimate
from bitnet_lit.reports.weight_sizes import WeightSizes, is_dense, unknown_scheme, weight_sizes
from bitnet_lit.runs.config_keys import natural, shown_apart, validated_on, value_of
from bitnet_lit.runs.history import DONE, FAILED, Run
from bitnet_lit.runs.metric_names import larger_is_better, smaller_is_better

_NO_GAP = Gap()
_DENSE = Gap(why_not="it is the dense model")


@dataclass
class Row:
    """The runs that agree in the `by` keys.

    Attributes:
        values: the value of each `by` key, as text.
        counted: the runs over which the mean is taken.
        left_out: the other runs, each with the reason.
        loss: the metric; None where no run has it.
        tokens: the number of tokens at which it was measured; None where the runs do not say, or differ.
        is_interpolated: whether it was read from the curves at that number of tokens.
        is_finished: whether the counted runs are done.
        is_dense: whether nothing is quantized in its model.
        sizes: those of its model; None where they are not known or differ.
        seconds: mean seconds of training.
        tokens_per_s: mean over the runs of the median speed.
    """

    values: dict[str, str]
    counted: list[Run] = field(default_factory=list)
    left_out: list[tuple[Run, str]] = field(default_factory=list)
    loss: Estimate | None = None
    tokens: float | None = None
    is_interpolated: bool = False
    is_finished: bool = False
    is_best: bool = False
    is_dense: bool = False
    sizes: WeightSizes | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    at_equal_tokens: Gap = _NO_GAP
    at_equal_bytes: Gap = _NO_GAP

    @property
    def name(self) -> str:
        """The row's values as one text; where no key names it, the folder of its run."""
        runs = [*self.counted, *(run for run, _ in self.left_out)]
        return " ".join(self.values.values()) or (runs[0].folder.absolute().name if len(runs) == 1 else "all runs")


@dataclass
class Comparison:
    """The rows of a report.

    Attributes:
        by: the keys that name the rows.
        over: the keys over which means are taken.
        metric: the column of metrics.csv that is compared.
        dense_bits: bits of a weight that is not quantized.
        notes: what a reader should know, one sentence each.
    """

    rows: list[Row]
    by: list[str]
    over: list[str]
    metric: str
    dense_bits: int
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """All runs, row by row."""
        return [run for row in self.rows for run in [*row.counted, *(run for run, _ in row.left_out)]]


def _why_not(run: Run, metric: str) -> str:
    """Return why a run cannot count; empty where it can."""
    if run.state == FAILED:
        return f"failed: {run.error}" if run.error else "failed"
    if final(run, metric) is not None:
        return ""
    if run.state == DONE:
        return f"has no {metric} that is a finite number"
    return f"{run.progress} and has no {metric} yet"


def _written_at(run: Run) -> tuple[float, str]:
    """Return a sort key by which the run that was written last comes last."""
    return max((path.stat().st_mtime for path in run.folder.glob("metrics.*")), default=0.0), str(run.folder)


def _choose(row: Row, runs: Sequence[Run], over: Sequence[str], metric: str) -> None:
    """Choose the runs that count in a row, and name the others."""
    reasons = {run: _why_not(run, metric) for run in runs}
    able = [run for run, why in reasons.items() if not why]
    row.is_finished = any(run.state == DONE for run in able)
    same: dict[object, list[Run]] = defaultdict(list)
    for run in able:
        if row.is_finished and run.state != DONE:
            reasons[run] = f"{run.progress}, and finished runs count"
        else:
            same[run.learned_from() or run].append(run)
    for each in same.values():
        *older, newest = sorted(each, key=_written_at)
        row.counted.append(newest)
        reasons |= dict.fromkeys(older, f"has the same config as {newest.folder}, which is newer")
    row.left_out = [(run, why) for run, why in reasons.items() if why]
    row.counted.sort(key=lambda run: [natural(value_of(run.config, key)) for key in over])


def _measure(row: Row, comparison: Comparison) -> None:
    """Take the means over the runs of a row."""
    measured = at_equal_tokens(row.counted, comparison.metric)
    row.loss = Estimate.of([*measured.values.values()]) if measured.values else None
    row.tokens, row.is_interpolated = measured.tokens, measured.is_interpolated
    if late := [run for run in row.counted if run not in measured.values]:
        why = f"has no {comparison.metric} at the {measured.tokens:,.0f} tokens that the others are compared at"
        row.left_out += [(run, why) for run in late]
        row.counted = [run for run in row.counted if run not in late]
    row.is_dense = all(is_dense(run.config) for run in row.counted)
    sizes = {weight_sizes(run.config, comparison.dense_bits) for run in row.counted}
    row.sizes = sizes.pop() if len(sizes) == 1 else None
    if spent := [float(run.seconds.values[-1]) for run in row.counted if len(run.seconds.values)]:
        row.seconds = float(np.mean(spent))
    speeds = [run.curve("perf/tokens_per_s").finite.values for run in row.counted]
    if speeds := [each for each in speeds if len(each)]:
        row.tokens_per_s = float(np.mean([np.median(each) for each in speeds]))


def compare(runs: Sequence[Run], by: list[str], over: list[str], metric: str, dense_bits: int) -> Comparison:
    """Compare runs.

    Args:
        by: dotted keys that name the rows.
        over: dotted keys in which the runs of a row differ.
        metric: a column of metrics.csv, such as "val/loss".
        dense_bits: bits of a weight that is not quantized.
    """
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(value_of(run.config, key) for key in by)].append(run)
    in_order = sorted(groups, key=lambda values: [natural(value) for value in values])
    comparison = Comparison([], by, over, metric, dense_bits)
    shown = [shown_apart(column) for column in zip(*in_order, strict=True)]
    for values in in_order:
        row = Row({key: texts[value] for key, texts, value in zip(by, shown, values, strict=True)})
        _choose(row, groups[values], over, metric)
        if row.counted:
            _measure(row, comparison)
        comparison.rows.append(row)
    counted = [run for row in comparison.rows for run in row.counted]
    dense = {run: weight_sizes(run.config, dense_bits) for run in counted if is_dense(run.config)}
    for row in comparison.rows:
        if row.is_dense:
            row.at_equal_tokens = row.at_equal_bytes = _DENSE
        elif row.counted:
            quantized = [run for run in row.counted if run not in dense]  # a dense run would be its own twin
            row.at_equal_tokens = gap_at_equal_tokens(quantized, list(dense), [*by, *over], metric)
            row.at_equal_bytes = gap_at_equal_bytes(quantized, row.sizes, dense, over, metric)
    unlike = _unlike_validation(counted, [*over]) if metric.startswith("val") else []
    if not unlike:
        _name_best(comparison)
    comparison.notes = _notes(comparison, unlike)
    return comparison


def _name_best(comparison: Comparison) -> None:
    """Name the best of the finished rows, where it is known whether more or less of the metric is better."""
    means = {row.loss.mean for row in comparison.rows if row.loss is not None and row.is_finished}
    if len(means) > 1 and (larger_is_better(comparison.metric) or smaller_is_better(comparison.metric)):
        best = max(means) if larger_is_better(comparison.metric) else min(means)
        for row in comparison.rows:
            row.is_best = row.is_finished and row.loss is not None and row.loss.mean == best


def _unlike_validation(runs: Sequence[Run], over: Sequence[str]) -> list[str]:
    """Return the keys by which runs are validated on different sequences, apart from the `over` keys."""
    values = [frozenset(validated_on(run.config).items()) for run in runs if run.config]
    common = frozenset.intersection(*values) if values else frozenset()
    return sorted({key for each in values for key, _ in each - common} - {*over})


def _notes(comparison: Comparison, unlike: Sequence[str]) -> list[str]:
    """Return what a reader should know about the rows.

    Args:
        unlike: the keys by which their runs are validated on different sequences.
    """
    notes = []
    if unlike:
        notes.append(
            f"the runs differ in {', '.join(unlike[:4])}: their {comparison.metric} may be of different sequences, so "
            "no row is called best: evaluate data_dir=<one folder> measures models on the same ones"
        )
    lengths = {row.tokens for row in comparison.rows if row.tokens is not None}
    if len(lengths) > 1:
        least, most = min(lengths), max(lengths)
        notes.append(f"the rows have different lengths, {least:,.0f} to {most:,.0f} tokens: a gap is at one length")
    schemes = (unknown_scheme(run.config) for row in comparison.rows for run in row.counted)
    for scheme in dict.fromkeys(filter(None, schemes)):
        notes.append(f"schemes=[{scheme}] gives the bytes of the weights that it rounds, if you trust that class")
    for row in comparison.rows:
        if mixed := _mixed_keys(row.counted, comparison.over):
            notes.append(f"{row.name}: its runs differ in {', '.join(mixed[:4])} too: by= can divide them")
        if row.is_interpolated:
            notes.append(f"{row.name}: its runs have different lengths: the mean is that at {row.tokens:,.0f} tokens")
        if row.counted and not row.is_finished:
            notes.append(f"{row.name}: no run is finished: the mean is that so far")
        notes += [f"{row.name}: {note}" for gap in (row.at_equal_tokens, row.at_equal_bytes) for note in gap.notes]
        notes += [f"{run.folder} {why}" for run, why in row.left_out]
    return notes


def _mixed_keys(runs: Sequence[Run], over: Sequence[str]) -> list[str]:
    """Return the keys in which the runs of a row differ, apart from the `over` keys."""
    values = [run.learned_from(*over) for run in runs]
    common = frozenset.intersection(*values) if values else frozenset()
    return sorted({key for each in values for key, _ in each - common})
