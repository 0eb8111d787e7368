"""python -m bitnet_lit.export: a model for other tools, compared with its source before it is called done."""

from __future__ import annotations

import sys

from bitnet_lit.cli import run_advice, run_door
from bitnet_lit.config import ExportConfig


def _export(config: ExportConfig) -> None:
    from bitnet_lit.artifacts.export import export

    export(config)


def main() -> None:
    """Entry point."""
    if "--advise" in sys.argv:
        run_advice([argument for argument in sys.argv[1:] if argument != "--advise"])
    else:
        run_door("export", _export)


if __name__ == "__main__":
    main()
