"""From what a user types after `checkpoint=` to a model folder."""

from __future__ import annotations

from pathlib import Path

from bitnet_lit.artifacts.model_folder import CONFIG_NAME, WEIGHTS_NAME
from bitnet_lit.errors import UserError

OUTPUTS = Path("outputs")


def find_model_folder(checkpoint: str | Path | None) -> Path:
    """The model folder that `checkpoint` means.

    Args:
        checkpoint: a run folder, a model folder, a file inside a model folder, or None for the newest run below
            `outputs/`.

    Raises:
        UserError: nothing there, or no model in it.
    """
    if checkpoint is None:
        configs = list(OUTPUTS.rglob(f"model/{CONFIG_NAME}")) if OUTPUTS.is_dir() else []
        if not configs:
            raise UserError(
                f"no trained model below {OUTPUTS.absolute()}: train one (python -m bitnet_lit.train) or give "
                "checkpoint=<run or model folder>"
            )
        return max(configs, key=lambda path: path.stat().st_mtime).parent
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(f"checkpoint={checkpoint}: no such file or folder")
    if path.is_file() and path.name in (WEIGHTS_NAME, CONFIG_NAME):
        path = path.parent
    for folder in (path, path / "model"):
        if (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file():
            return folder
    hint = (
        "give the run folder it lies in"
        if path.suffix == ".ckpt"
        else "a run that was stopped before its first export has none"
    )
    raise UserError(
        f"checkpoint={checkpoint}: no model there ({CONFIG_NAME} and {WEIGHTS_NAME}, directly or in model/): {hint}"
    )
