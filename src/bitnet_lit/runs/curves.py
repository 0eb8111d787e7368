"""`plot_curves` draws a metric of several runs over their optimizer steps, read from each metrics.csv."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

from bitnet_lit.config import PlotConfig
from bitnet_lit.errors import UserError, disk_errors, nearest, one_line
from bitnet_lit.extras import needs
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.files.regular_file import check_replaceable
from bitnet_lit.runs.config_keys import full_key, telling_keys, value_of
from bitnet_lit.runs.folder import CSV_NAME
from bitnet_lit.runs.history import Run, no_runs, read_run, run_folders

_PNG = re.compile(rb"\x89PNG\r\n\x1a\n")  # how each begins


def _label(run: Run, key: str) -> str:
    """Return the text that a run's colour stands for: a value of its config, or the folder's name without a config.

    Args:
        key: the key of that value in the config, such as "optim.learning_rate". A group stands for its name, or for the
            class of the user's own that it names.
    """
    return f"{key}={value_of(run.config, key, absent='None')}" if run.config else run.folder.name


def _by_label(runs: Iterable[Run], key: str) -> dict[str, dict[str, Run]]:
    """Return the runs by their label, and those of one label by the legend's text.

    That text names the keys in which the runs of a label differ, such as "quant=b158 seed=1". Where no key tells two of
    them apart, as in a copy, it has the folder.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_label(run, key), []).append(run)
    named: dict[str, dict[str, Run]] = {}
    for label, group in groups.items():
        keys = telling_keys([run.config for run in group], over=[key])
        values = [" ".join([label, *(f"{other}={value_of(run.config, other)}" for other in keys)]) for run in group]
        texts = [one_line(text, 200) for text in values]
        named[label] = {
            text if texts.count(text) == 1 else f"{text} ({run.folder})": run
            for text, run in zip(texts, group, strict=True)
        }
    return named


def _drawn(text: str) -> str:
    """Escape a text for matplotlib, where a dollar begins a formula and a leading underscore hides a label."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def plot_curves(config: PlotConfig) -> Path:
    """Draw a metric over optimizer steps, one line per run, and return the path of the picture.

    Runs with one value of the label's key have one colour, and lines of several kinds.

    Raises:
        UserError: there are no runs, none has the metric or the label's key, `out` names no kind of picture or a
            file that is none, or matplotlib is not installed.
        DiskError: the disk is full.
    """
    with needs("matplotlib", "plot"):
        from matplotlib.figure import Figure
    without: list[str] = []  # runs without the metric, such as those that have no validation yet
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    folders = [folder for folder in run_folders(config.runs) if (folder / CSV_NAME).is_file()]
    if not folders:
        raise no_runs(config.runs)
    runs = list(map(read_run, folders))
    key = config.label
    if key != PlotConfig.label:  # a run of another project need not have a group `quant`
        key = full_key("label", key, [run.config for run in runs])
    for run in runs:
        if not len(run.curve(config.metric).steps):
            has = f"has {', '.join(sorted(run.curves))}" if run.curves else "has no rows"
            without.append(f"{run.folder / CSV_NAME}, which {has}")
    drawn = [run for run in runs if len(run.curve(config.metric).steps)]
    for number, group in enumerate(_by_label(drawn, key).values()):
        for (text, run), line in zip(group.items(), cycle(("-", "--", ":", "-.")), strict=False):
            curve = run.curve(config.metric)
            label = _drawn(f"{text}: {curve.values[-1]:.3f}")
            axes.plot(curve.steps, curve.values, marker=".", color=f"C{number}", linestyle=line, label=label)
    if not axes.lines:
        near = nearest(config.metric, sorted({name for run in runs for name in run.curves}), 0.6)
        remedy = f"did you mean {near}?" if near else "give a metric that is logged, or wait for it"
        raise UserError(f"metric={config.metric}: not in {without[0]}: {remedy}")
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
    if not out.suffix:  # a Makefile, perhaps
        remedy = f"choose another out=, such as out={config.out}.png"
        check_replaceable(out, _PNG, "is no picture", remedy, key="out=")
    with disk_errors(f"out={config.out}", refused="choose another out="):
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as temporary:
            try:
                figure.savefig(temporary, format=kind)
            except (ValueError, OverflowError) as error:  # damaged values, such as 1e308
                raise UserError(f"metric={config.metric}: its values cannot be drawn ({one_line(error)})") from None
    return out
