"""python -m bitnet_lit.prepare: text to llama2.c shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnet_lit.entry_point import run_command

if TYPE_CHECKING:
    from bitnet_lit.config import PrepareConfig


def _prepare(config: PrepareConfig) -> None:
    from bitnet_lit.data.prepare import prepare

    prepare(config)


def main() -> None:
    """Entry point."""
    run_command("prepare", _prepare)


if __name__ == "__main__":
    main()
