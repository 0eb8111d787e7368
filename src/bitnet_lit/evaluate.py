"""`python -m bitnet_lit.evaluate` prints loss, perplexity, bits per byte and accuracy on a validation split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnet_lit.entry_point import run_command

if TYPE_CHECKING:
    from bitnet_lit.config import EvaluateConfig


def _evaluate(config: EvaluateConfig) -> None:
    from bitnet_lit.inference.evaluation import evaluate
    from bitnet_lit.terminal import console

    page = console()
    for name, value in evaluate(config).items():
        page.print(f"{name:16}{value:.6f}" if isinstance(value, float) else f"{name:16}{value}")


def main() -> None:
    """Run the command with the arguments in `sys.argv`."""
    run_command("evaluate", _evaluate)


if __name__ == "__main__":
    main()
