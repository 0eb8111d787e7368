"""From what a user types after `checkpoint=` or `init_from=` to a model on disk, whatever wrote it."""

from __future__ import annotations

import re
from pathlib import Path

from bitnet_lit.artifacts.config_json import CONFIG_NAME, read_raw_config
from bitnet_lit.artifacts.hub_folder import open_hub_folder
from bitnet_lit.artifacts.model_folder import WEIGHTS_NAME, open_model_folder
from bitnet_lit.artifacts.source import Source
from bitnet_lit.errors import UserError, needs_extra

OUTPUTS = Path("outputs")


def _is_model_folder(folder: Path) -> bool:
    weights = (folder / WEIGHTS_NAME, folder / f"{WEIGHTS_NAME}.index.json")
    return (folder / CONFIG_NAME).is_file() and any(path.is_file() for path in weights)


def _from_hub(repository: str) -> Path:
    """Download a model of the Hugging Face hub, or find it in the cache."""
    with needs_extra("huggingface_hub", f"checkpoint={repository}"):
        import huggingface_hub
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"], max_workers=4
            )
        )
    except (OSError, ValueError) as error:  # the library's own errors are of these two kinds
        raise UserError(
            f"checkpoint={repository}: no such file or folder here, and the hub says: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None


def find_model(checkpoint: str | Path | None) -> Path:
    """The model folder, or the llama2.c file, that `checkpoint` means.

    Args:
        checkpoint: a run folder, a model folder, a file inside a model folder, a .pt or .bin of llama2.c, a model of
            the Hugging Face hub (owner/name), or None for the newest run below `outputs/`.

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
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(checkpoint)):
            return _from_hub(str(checkpoint))
        raise UserError(f"checkpoint={checkpoint}: no such file or folder")
    if path.is_file() and path.suffix in (".pt", ".bin"):
        return path
    if path.is_file() and path.name in (WEIGHTS_NAME, CONFIG_NAME):
        path = path.parent
    for folder in (path, path / "model"):
        if _is_model_folder(folder):
            return folder
    hint = (
        "give the run folder it lies in"
        if path.suffix == ".ckpt"
        else "a run that was stopped before its first export has none"
    )
    raise UserError(
        f"checkpoint={checkpoint}: no model there ({CONFIG_NAME} and {WEIGHTS_NAME}, directly or in model/): {hint}"
    )


def open_source(path: Path) -> Source:
    """A model as a source of tensors; see `find_model` for what `path` can be.

    Raises:
        UserError: damaged, or a network that is not known here; one line each.
    """
    try:
        if path.is_file():
            from bitnet_lit.artifacts.llama2c_file import open_bin, open_pt  # imports torch

            return open_pt(path) if path.suffix == ".pt" else open_bin(path)
        raw = read_raw_config(path)
        return open_model_folder(path, raw) if "bitnet_lit" in raw else open_hub_folder(path, raw)
    except UserError as error:
        line = " ".join(str(error).split())  # a damaged file's own values stand in it
        raise UserError(line if len(line) <= 500 else f"{line[:400]} ... {line[-100:]}") from None
