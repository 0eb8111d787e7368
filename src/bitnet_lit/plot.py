"""`python -m bitnet_lit.plot` draws a metric of several runs as a picture, a PNG by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnet_lit.entry_point import run_command

if TYPE_CHECKING:
    from bitnet_lit.config import PlotConfig


def _plot(config: PlotConfig) -> None:
    from bitnet_lit.runs.curves import plot_curves

    print(plot_curves(config))


def main() -> None:
    """Run the command with the arguments in `sys.argv`."""
    run_command("plot", _plot)


if __name__ == "__main__":
    main()
