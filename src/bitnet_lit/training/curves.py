"""Curves of runs from their metrics.csv."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from bitnet_lit.config import PlotConfig
from bitnet_lit.errors import UserError
from bitnet_lit.training.loggers import CSV_NAME, read_metrics
from bitnet_lit.training.resume import CONFIG_NAME


def _run_folders(runs: list[str]) -> list[Path]:
    folders = [path.parent for run in runs for path in sorted(Path(run).rglob(CSV_NAME))]
    if not folders:
        raise UserError(f"runs={list(runs)}: no {CSV_NAME} below: give run folders, or a sweep's folder")
    return folders


def _label(folder: Path, key: str) -> str:
    value = OmegaConf.select(OmegaConf.load(folder / CONFIG_NAME), key)
    if OmegaConf.is_config(value):
        value = OmegaConf.select(value, "name")
    return f"{key}={value}"


def plot_curves(config: PlotConfig) -> Path:
    """Draw `metric` over optimizer steps, one line per run; returns the path of the picture.

    Raises:
        UserError: no runs, no such metric, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("matplotlib is not installed: pip install 'bitnet-lit[plot]'") from None
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for folder in _run_folders(config.runs):
        rows = read_metrics(folder / CSV_NAME)
        points = [(int(row["step"]), float(row[config.metric])) for row in rows if config.metric in row]
        if not points:
            known = sorted({name for row in rows for name in row} - {"step"})
            raise UserError(f"metric={config.metric}: not in {folder / CSV_NAME}, which has {', '.join(known)}")
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker=".", label=f"{_label(folder, config.label)}: {values[-1]:.3f}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"{config.metric}{' (nats per token)' if config.metric.endswith('loss') else ''}")
    axes.grid(alpha=0.3)
    axes.legend()
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out
