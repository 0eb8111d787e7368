"""`python -m bitnet_lit.evaluate` prints loss, perplexity, bits per byte and accuracy on a validation split or text."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

from bitnet_lit.entry_point import run_command

if TYPE_CHECKING:
    from bitnet_lit.config import EvaluateConfig


def _evaluate(config: EvaluateConfig) -> None:
    from bitnet_lit.inference.evaluation import evaluate
    from bitnet_lit.terminal import console

    page = console()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        figures = evaluate(config)
    for name, value in figures.items():
        page.print(f"{name:16}{value:.6f}" if isinstance(value, float) else f"{name:16}{value}")


def main() -> None:
    """Run the command with the arguments in `sys.argv`."""
    run_command("evaluate", _evaluate)


if __name__ == "__main__":
    main()
