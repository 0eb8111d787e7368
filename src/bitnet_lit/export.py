"""`python -m bitnet_lit.export` writes a model in formats of other tools, and compares each export with the model.

With `--advise` it prints to which formats a training config, or the model of `checkpoint=`, can be exported, and what
to change for the others.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from bitnet_lit.entry_point import run_command

if TYPE_CHECKING:
    from bitnet_lit.config import ExportConfig, TrainConfig


def _export(config: ExportConfig) -> None:
    from bitnet_lit.exports.write import export

    export(config)


def _advise_on_model(config: ExportConfig) -> None:
    """Print which export targets the model of `checkpoint=` can reach."""
    from bitnet_lit.checkpoints.locate import find_model, open_stored
    from bitnet_lit.exports.targets import print_advice

    stored = open_stored(find_model(config.checkpoint))
    print_advice(stored.config, stored.quant)


def _advise_on_training(config: TrainConfig) -> None:
    """Print which export targets a model can reach that is trained with this config.

    Raises:
        UserError: the network is one of the user's own, or the config takes its sizes from a model that is there.
    """
    from bitnet_lit.config import ModelConfig
    from bitnet_lit.errors import UserError
    from bitnet_lit.exports.targets import print_advice

    for key in ("resume", "init_from"):
        if (path := getattr(config, key)) is not None:
            raise UserError(f"--advise {key}={path}: the sizes are those of that model: give checkpoint={path}")
    if not isinstance(config.model, ModelConfig):
        raise UserError(
            f"--advise model._target_={config.model._target_}: formats describe the network of this package: one of "
            "your own is saved as a model folder, which evaluate opens"
        )
    print_advice(config.model, config.quant)


def _without_folder(overrides: list[str], is_sweep: bool) -> list[str]:
    """Return overrides by which Hydra makes no run folder.

    Raises:
        UserError: several configs were asked for.
    """
    from bitnet_lit.errors import UserError

    if is_sweep:
        raise UserError("--advise is about one model: leave out -m")
    return ["hydra.run.dir=.", "hydra.output_subdir=null"]


def main() -> None:
    """Run the command with the arguments in `sys.argv`."""
    if "--advise" not in sys.argv:
        run_command("export", _export)
        return
    sys.argv.remove("--advise")
    if any(argument.startswith("checkpoint=") for argument in sys.argv):
        run_command("export", _advise_on_model)
    else:
        run_command("train", _advise_on_training, defaults=_without_folder)


if __name__ == "__main__":
    main()
