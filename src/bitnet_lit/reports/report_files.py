"""`report` reads runs, compares them, prints the table and writes report.csv, report.md and report.html."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

from bitnet_lit.config import ReportConfig
from bitnet_lit.config.network import import_schemes
from bitnet_lit.errors import UserError, disk_errors, nearest
from bitnet_lit.extras import needs
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.files.regular_file import check_replaceable
from bitnet_lit.reports.comparison import Comparison, compare
from bitnet_lit.reports.page import as_page
from bitnet_lit.reports.tables import as_csv, as_markdown, print_table
from bitnet_lit.runs.config_keys import dividing_keys, full_key, telling_keys
from bitnet_lit.runs.history import Run, read_record, read_runs

CSV_REPORT, MARKDOWN_REPORT, PAGE_REPORT = "report.csv", "report.md", "report.html"
# How each file begins, in every version.
_STARTS = {
    CSV_REPORT: re.compile(rb".*gap_at_equal_tokens", re.DOTALL),
    MARKDOWN_REPORT: re.compile(rb"# Report of [^\n]*\n\n\|"),
    PAGE_REPORT: re.compile(rb"<!doctype html>.*<title>Report of ", re.DOTALL),
}


def _split(typed: list[str]) -> list[str]:
    """Return the keys of `by=quant,model`, which arrives as one text."""
    return [key for each in typed for part in each.split(",") if (key := part.strip())]


def _keys(config: ReportConfig, runs: list[Run]) -> tuple[list[str], list[str]]:
    """Return the full names of the `by` and the `over` keys."""
    configs = [run.config for run in runs]
    over = [full_key("over", key, configs) for key in _split(config.over)] if config.over != ["seed"] else ["seed"]
    if not (typed := _split(config.by)):
        return _telling_keys(runs, over), over
    return [full_key("by", key, configs) for key in dict.fromkeys(typed)], over


def _telling_keys(runs: list[Run], over: list[str]) -> list[str]:
    """Return the keys that tell runs apart, those of jobs that have not begun included.

    A run fills in values as it begins, such as the vocabulary of its data. A job that has not begun lacks them, so it
    is told apart by what Hydra recorded in its folder and in those of the others.
    """
    configs = [run.config for run in runs]
    begun = [run.config for run in runs if run.has_begun]
    if not begun or len(begun) == len(runs):
        return telling_keys(configs, over)
    recorded = []
    for run in runs:
        with contextlib.suppress(UserError):  # damaged
            recorded.append(read_record(run.folder))
    candidates = telling_keys([record for record in recorded if record], over)
    return dividing_keys(candidates, configs, telling_keys(begun, over))


def _folder(config: ReportConfig, runs: list[Run]) -> Path:
    """Return the folder to write: `out`, the one folder of `runs`, or the folder that all runs lie in."""
    if config.out is not None:
        return Path(config.out)
    if len(config.runs) == 1 and os.path.isdir(config.runs[0]):
        return Path(config.runs[0])
    return Path(os.path.commonpath([run.folder.absolute() for run in runs]))


def make_comparison(config: ReportConfig) -> Comparison:
    """Read and compare the runs of `config`.

    Raises:
        UserError: there are no runs, no run has a key of `by` or `over`, or no run has the metric.
    """
    import_schemes(config.schemes)
    damaged: list[str] = []
    runs = read_runs(config.runs, lambda error: damaged.append(str(error)))
    if not runs:
        raise UserError(f"runs={config.runs}: no run can be read: {damaged[0]}")
    by, over = _keys(config, runs)
    comparison = compare(runs, by, over, config.metric, config.dense_bits)
    known = sorted({name for run in runs for name in run.curves})
    is_late = config.metric == ReportConfig.metric  # no run has come to its first validation
    if known and config.metric not in known and not is_late and all(row.loss is None for row in comparison.rows):
        near = nearest(config.metric, known, 0.6)
        which = f": did you mean {near}?" if near else f", which have {', '.join(known)}"
        raise UserError(f"metric={config.metric}: in no metrics.csv of these runs{which}")
    comparison.notes += [f"left out: {error}" for error in damaged]
    return comparison


def _check_out(folder: Path) -> None:
    """Refuse to replace a file that no report wrote: the user names the folder, and not the files in it.

    Raises:
        UserError: such a file lies there.
    """
    for name, start in _STARTS.items():
        check_replaceable(folder / name, start, "no report wrote it", "choose another out=, or move it away")


def report(config: ReportConfig) -> Comparison:
    """Compare the runs of `config`, print the table, and write the files of the report.

    Without the package plotly there is no report.html, and a line says so.

    Raises:
        UserError: as `make_comparison`, or `out` cannot be written or has a file of this name that no report wrote.
        DiskError: the disk is full.
    """
    comparison = make_comparison(config)
    folder = _folder(config, comparison.runs)
    _check_out(folder)
    title = f"Report of {folder.absolute().name}"
    texts = {CSV_REPORT: as_csv(comparison), MARKDOWN_REPORT: as_markdown(comparison, title)}
    print_table(comparison)
    missing = ""
    try:
        with needs("plotly", PAGE_REPORT):
            from plotly.offline import get_plotlyjs
        texts[PAGE_REPORT] = as_page(comparison, title, get_plotlyjs())
    except UserError as error:
        missing = str(error)
    with disk_errors(f"out={folder}", refused="choose another out="):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with atomic_file(folder / name) as temporary:
                temporary.write_bytes(text.encode("utf-8", "replace"))
    for name in texts:
        print(folder / name)
    if missing:
        print(f"note: {missing}", file=sys.stderr)
    return comparison
