"""python -m bitnet_lit.plot: curves of runs, as a PNG."""

from __future__ import annotations

from bitnet_lit.config import PlotConfig
from bitnet_lit.door import run_door


def _plot(config: PlotConfig) -> None:
    from bitnet_lit.training.curves import plot_curves

    print(plot_curves(config))


def main() -> None:
    """Entry point."""
    run_door("plot", _plot)


if __name__ == "__main__":
    main()
