"""`python -m bitnet_lit.export` writes a model in formats of other tools, and compares each export with the model.

With `--advise` it prints to which formats a training config, or the model of `checkpoint=`, can be exported, and what
to change for the others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitnet_lit.entry_point import leave, run_command

if TYPE_CHECKING:
    from bitnet_lit.config import ExportConfig


def _export(config: ExportConfig) -> None:
    from bitnet_lit.exports.write import export

    export(config)


def advise(overrides: Sequence[str]) -> None:
    """Print which export targets a model can reach, and what to change for the others.

    Args:
        overrides: the keys of a training config, or the `checkpoint=` of a model that is there.
    """
    from bitnet_lit.cli import compose
    from bitnet_lit.exports.targets import print_advice

    if any(override.startswith("checkpoint=") for override in overrides):
        from bitnet_lit.checkpoints.locate import find_model, open_stored

        stored = open_stored(find_model(compose("export", overrides).checkpoint))
        return print_advice(stored.config, stored.quant)
    config = compose("train", overrides)
    print_advice(config.model, config.quant)


def main() -> None:
    """Run the command with the arguments in `sys.argv`."""
    if "--advise" in sys.argv:
        leave(lambda: advise([argument for argument in sys.argv[1:] if argument != "--advise"]))
    else:
        run_command("export", _export)


if __name__ == "__main__":
    main()
