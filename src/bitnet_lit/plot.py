"""python -m bitnet_lit.plot: curves of runs, as a PNG."""

from __future__ import annotations

from bitnet_lit.cli import run_door
from bitnet_lit.config import PlotConfig


def _plot(config: PlotConfig) -> None:
    from bitnet_lit.training.curves import plot_curves

    print(plot_curves(config))


def main() -> None:
    """Entry point."""
    run_door("plot", _plot)


if __name__ == "__main__":
    main()
