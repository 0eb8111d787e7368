"""python -m bitnet_lit.infer: a model folder tells a story."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnet_lit.entry_point import run_command

if TYPE_CHECKING:
    from bitnet_lit.config import InferConfig


def _infer(config: InferConfig) -> None:
    from bitnet_lit.inference.print_texts import infer

    infer(config)


def main() -> None:
    """Entry point."""
    run_command("infer", _infer)


if __name__ == "__main__":
    main()
