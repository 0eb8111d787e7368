"""`python -m bitnet_lit.infer` lets a model continue prompts, and prints the texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnet_lit.entry_point import run_command

if TYPE_CHECKING:
    from bitnet_lit.config import InferConfig


def _infer(config: InferConfig) -> None:
    from bitnet_lit.inference.print_texts import infer

    infer(config)


def main() -> None:
    """Run the command with the arguments in `sys.argv`."""
    run_command("infer", _infer)


if __name__ == "__main__":
    main()
