"""`plot_curves` draws a metric of several runs over their optimizer steps, read from each metrics.csv."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bitnet_lit.atomic import atomic_file
from bitnet_lit.config import PlotConfig
from bitnet_lit.errors import UserError, disk_errors
from bitnet_lit.extras import needs
from bitnet_lit.plain_yaml import read_yaml
from bitnet_lit.runs.folder import CONFIG_NAME, CSV_NAME
from bitnet_lit.runs.metrics_csv import read_metrics


def _run_folders(runs: list[str]) -> list[Path]:
    folders = [path.parent for run in runs for path in sorted(Path(run).rglob(CSV_NAME))]
    if not folders:
        raise UserError(f"runs={list(runs)}: no {CSV_NAME} below: give run folders, or a sweep's folder")
    return folders


def _label(folder: Path, key: str) -> str:
    """Return the legend's text for a run: a value of its config, or the folder's name where it has no config.

    Args:
        key: the key of that value in the config, such as "optim.learning_rate". A group stands for its name, or for the
            class of the user's own that it names.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        return folder.name
    value: Any = read_yaml(path, "move it away to label the run by its folder's name")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, dict):  # the key names a group
        value = value.get("name", value.get("_target_"))
    return f"{key}={value}"


def _points(folder: Path, metric: str) -> tuple[list[int], list[float]]:
    """Return the optimizer steps and the values of a metric in a run's metrics.csv."""
    steps, values = [], []
    for row in read_metrics(folder / CSV_NAME):
        if metric in row:
            try:
                values.append(float(row[metric]))
            except ValueError:
                where = f"{folder / CSV_NAME}: {metric} of step {row['step']}"
                raise UserError(f"{where} is {row[metric]!r}, no number: put a copy there, or move it away") from None
            steps.append(int(row["step"]))
    return steps, values


def _drawn(text: str) -> str:
    """Escape a text for matplotlib, where a dollar begins a formula and a leading underscore hides a label."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def plot_curves(config: PlotConfig) -> Path:
    """Draw a metric over optimizer steps, one line per run, and return the path of the picture.

    Raises:
        UserError: there are no runs, none has the metric, `out` names no kind of picture, or matplotlib is not
            installed.
        DiskError: the disk is full.
    """
    with needs("matplotlib", "plot"):
        from matplotlib.figure import Figure
    without: list[str] = []  # runs without the metric, such as those that have no validation yet
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for folder in _run_folders(config.runs):
        steps, values = _points(folder, config.metric)
        if not steps:
            known = sorted({name for row in read_metrics(folder / CSV_NAME) for name in row} - {"step"})
            has = f"has {', '.join(known)}" if known else "has no rows"
            without.append(f"{folder / CSV_NAME}, which {has}")
            continue
        axes.plot(steps, values, marker=".", label=_drawn(f"{_label(folder, config.label)}: {values[-1]:.3f}"))
    if not axes.lines:
        raise UserError(f"metric={config.metric}: not in {without[0]}: give a metric that is logged, or wait for it")
    for place in without:
        print(f"note: metric={config.metric} is not in {place}: that run is not drawn", file=sys.stderr)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(_drawn(f"{config.metric}{' (nats per token)' if config.metric.endswith('loss') else ''}"))
    axes.grid(alpha=0.3)
    axes.legend()
    out = Path(config.out)
    kind = out.suffix.removeprefix(".").lower() or "png"
    if kind not in (kinds := figure.canvas.get_supported_filetypes()):
        raise UserError(f"out={config.out}: no kind of picture is called .{kind}: take one of {', '.join(kinds)}")
    with disk_errors(f"out={config.out}", refused="choose another out="):
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as temporary:
            figure.savefig(temporary, format=kind)
    return out
