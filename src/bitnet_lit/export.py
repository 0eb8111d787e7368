"""python -m bitnet_lit.export: a model for other tools, compared with the original before it is called done."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from bitnet_lit.entry_point import leave, run_command

if TYPE_CHECKING:
    from bitnet_lit.config import ExportConfig


def _export(config: ExportConfig) -> None:
    from bitnet_lit.exports.write import export

    export(config)


def _advise(overrides: list[str]) -> None:
    from bitnet_lit.cli import advise

    advise(overrides)


def main() -> None:
    """Entry point."""
    if "--advise" in sys.argv:
        leave(lambda: _advise([argument for argument in sys.argv[1:] if argument != "--advise"]))
    else:
        run_command("export", _export)


if __name__ == "__main__":
    main()
