"""`python -m bitnet_lit.export` writes a model in formats of other tools, and compares each export with the model.

With `--advise` it prints to which formats a training config, or the model of `checkpoint=`, can be exported, and what
to change for the others.
"""

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
    """Run the command with the arguments in `sys.argv`."""
    if "--advise" in sys.argv:
        leave(lambda: _advise([argument for argument in sys.argv[1:] if argument != "--advise"]))
    else:
        run_command("export", _export)


if __name__ == "__main__":
    main()
