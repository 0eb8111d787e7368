"""A report as a table: in the terminal, as report.csv with every figure in full, and as report.md."""

from __future__ import annotations

import csv
import io
from typing import Any

from rich.table import Table

from bitnet_lit.reports.comparison import Comparison, Row
from bitnet_lit.reports.gaps import Gap
from bitnet_lit.reports.statistics import Estimate
from bitnet_lit.reports.units import amount, duration, megabytes
from bitnet_lit.runs.config_keys import ABSENT
from bitnet_lit.terminal import wide_console


def with_interval(estimate: Estimate | None, signed: bool = False) -> str:
    """Return a mean with half of its 95 % interval, such as "0.4991 ± 0.0123"."""
    if estimate is None:
        return ABSENT
    mean = f"{estimate.mean:+.4f}" if signed else f"{estimate.mean:.4f}"
    return mean if estimate.half_width is None else f"{mean} ± {estimate.half_width:.4f}"


def short_keys(keys: list[str]) -> list[str]:
    """Return the last part of each key, or the whole key where two of them end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return [part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)]


def headings(comparison: Comparison) -> list[str]:
    """Return the headings of the table."""
    return [
        *short_keys(comparison.by),
        "runs",
        comparison.metric,
        "gap at equal tokens",
        "gap at equal bytes",
        "tokens",
        "bits/weight",
        "weights",
        "time",
        "tokens/s",
    ]


def runs_text(row: Row) -> str:
    """Return how many runs of a row count, of how many."""
    total = len(row.counted) + len(row.left_out)
    count = row.loss.count if row.loss is not None else 0
    return f"{count}" if count == total else f"{count} of {total}"


def cells(row: Row) -> list[str]:
    """Return the row as text, one cell for each heading."""
    return [
        *row.values.values(),
        runs_text(row),
        with_interval(row.loss),
        with_interval(row.at_equal_tokens.estimate, signed=True),
        with_interval(row.at_equal_bytes.estimate, signed=True),
        amount(row.tokens),
        ABSENT if row.sizes is None else f"{row.sizes.bits_per_weight:.3g}",
        ABSENT if row.sizes is None else megabytes(row.sizes.num_bytes),
        duration(row.seconds),
        amount(row.tokens_per_s),
    ]


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of the table as text, without columns that are empty in every row."""
    names, rows = headings(comparison), [cells(row) for row in comparison.rows]
    kept = [i for i in range(len(names)) if any(row[i] != ABSENT for row in rows) or i < len(comparison.by)]
    return [names[i] for i in kept], [[row[i] for i in kept] for row in rows]


def explanation(comparison: Comparison) -> list[str]:
    """Return what the figures of the table are, one sentence each."""
    over = ", ".join(comparison.over)
    batches = (
        "In finished runs of one length it is of the whole validation split. Points of the curves are of the batches "
        "that every validation takes."
    )
    return [
        f"{comparison.metric}: mean over {over or 'runs'} ± half of the 95 % interval (Student's t); "
        "one run alone has no interval.",
        *([batches] if comparison.metric.startswith("val/") else []),
        "Gaps are differences to the dense model, paired by run: at equal tokens to the run that differs in quant "
        "alone, at equal bytes to dense models of other sizes, interpolated in the logarithm of bytes.",
        f"Weights that are not quantized count {comparison.dense_bits} bits. Time is training time without validation.",
    ]


def reasons(comparison: Comparison) -> list[str]:
    """Return why rows have no gaps, one sentence for each reason."""
    if not any(row.is_dense for row in comparison.rows):
        return ["no gap to a dense model: no run with quant=none counts"]
    found: dict[str, list[str]] = {}
    for row in comparison.rows:
        for name, gap in (("tokens", row.at_equal_tokens), ("bytes", row.at_equal_bytes)):
            if gap.why_not and not row.is_dense:
                found.setdefault(f"no gap at equal {name}: {gap.why_not}", []).append(row.name)
    return [f"{', '.join(names[:6])}{' and others' if len(names) > 6 else ''}: {why}" for why, names in found.items()]


def print_table(comparison: Comparison) -> None:
    """Print the table and the notes to the terminal."""
    names, rows = table(comparison)
    page, grid = wide_console(24 * len(names)), Table()
    for i, name in enumerate(names):
        grid.add_column(name, justify="left" if i < len(comparison.by) else "right")
    best = names.index(comparison.metric) if comparison.metric in names else 0
    for row, texts in zip(comparison.rows, rows, strict=True):
        texts[best] += " best" if row.is_best else ""
        grid.add_row(*texts, style="bold" if row.is_best else None)
    page.print(grid)
    for line in [*reasons(comparison), *comparison.notes]:
        page.print(f"note: {line}")


def _gap_figures(name: str, gap: Gap) -> dict[str, Any]:
    estimate = gap.estimate
    return {
        f"gap_at_equal_{name}": None if estimate is None else estimate.mean,
        f"gap_at_equal_{name}_ci95": None if estimate is None else estimate.half_width,
        f"gap_at_equal_{name}_pairs": 0 if estimate is None else estimate.count,
        f"gap_at_equal_{name}_tokens": gap.tokens,
        f"gap_at_equal_{name}_why_not": gap.why_not,
    }


def figures(row: Row, comparison: Comparison) -> dict[str, Any]:
    """Return every figure of a row by the name of its column in report.csv. ci95 is half of the 95 % interval."""
    loss, sizes = row.loss, row.sizes
    return {
        **row.values,
        "runs": 0 if loss is None else loss.count,
        "left_out": len(row.left_out),
        "finished": row.is_finished,
        "best": row.is_best,
        comparison.metric: None if loss is None else loss.mean,
        f"{comparison.metric}_ci95": None if loss is None else loss.half_width,
        "tokens": row.tokens,
        **_gap_figures("tokens", row.at_equal_tokens),
        **_gap_figures("bytes", row.at_equal_bytes),
        "parameters": None if sizes is None else sizes.parameters,
        "bits_per_weight": None if sizes is None else sizes.bits_per_weight,
        "bytes": None if sizes is None else sizes.num_bytes,
        "seconds": row.seconds,
        "tokens_per_s": row.tokens_per_s,
    }


def as_csv(comparison: Comparison) -> str:
    """Return the text of report.csv."""
    rows = [figures(row, comparison) for row in comparison.rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _in_markdown(text: str) -> str:
    """Escape a text for a cell or a line of Markdown, so that it shows as it is."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{sign}" if sign in "\\`*_[]|~#" else sign for sign in text)


def as_markdown(comparison: Comparison, title: str) -> str:
    """Return the text of report.md: the table, why gaps are missing, notes, and what the figures are."""
    names, rows = table(comparison)
    num_keys = len(comparison.by)
    lines = [f"# {_in_markdown(title)}", ""]
    lines += [f"| {' | '.join(map(_in_markdown, names))} |", "|--" * num_keys + "|--:" * (len(names) - num_keys) + "|"]
    for row, texts in zip(comparison.rows, rows, strict=True):
        escaped = map(_in_markdown, texts)
        lines.append(f"| {' | '.join(f'**{text}**' if row.is_best else text for text in escaped)} |")
    for paragraph in ([*reasons(comparison), *comparison.notes], explanation(comparison)):
        lines += ["", *(f"- {_in_markdown(line)}" for line in paragraph)] if paragraph else []
    return "\n".join(lines) + "\n"
