"""The value of `checkpoint=` or `init_from=` is turned into a model on disk here, in any format.

The value is first read as a path. The hub is asked only for `owner/name` where no folder `owner` exists and `owner` is
not a folder for runs. If there is no model at a path, the error says what was looked for, where, and what is there
instead.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from bitnet_lit.checkpoints.config_json import network_in, read_raw_config
from bitnet_lit.checkpoints.file_names import CONFIG_NAME, PICKLED_NAME, WEIGHTS_NAME, has_model
from bitnet_lit.checkpoints.formats.format import Format, formats
from bitnet_lit.checkpoints.formats.huggingface import open_hub_folder
from bitnet_lit.checkpoints.formats.model_folder import open_model_folder
from bitnet_lit.checkpoints.hub_download import download_model
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.errors import UserError, one_line
from bitnet_lit.runs.folder import CHECKPOINTS, MODEL, OUTPUTS, is_run
from bitnet_lit.runs.folder import CONFIG_NAME as RUN_CONFIG_NAME

RUN_FOLDERS = ("outputs", "multirun", "data")  # never taken for an owner on the hub
SHOWN_RUNS = 2
# Suffixes of files that are not models here, and what to give instead.
REMEDIES = {
    ".ckpt": "a checkpoint for resume=: give the run folder it lies in",
    ".pth": "a pickle, which is not opened here: convert it to safetensors",
    ".onnx": "give the model it was made from",
}


def _models_below(folder: Path) -> Iterator[tuple[float, Path]]:
    """Yield the models of runs below a folder and the time each was written; links to folders are not followed."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        path = Path(root)
        if path.name == MODEL and CONFIG_NAME in files and has_model(path):
            try:
                yield (path / CONFIG_NAME).stat().st_mtime, path
            except FileNotFoundError:  # it is being replaced
                continue


def _newest() -> Path:
    models = list(_models_below(OUTPUTS))
    if not models:
        folders = (path.parent for path in sorted(OUTPUTS.rglob(RUN_CONFIG_NAME)))
        runs = [each for each in folders if is_run(each) and not each.name.startswith(".")]  # Hydra keeps its own there
        begun = f" (runs without a model yet: {', '.join(map(str, runs[-SHOWN_RUNS:]))})" if runs else ""
        raise UserError(
            f"no trained model below {OUTPUTS.absolute()}{begun}: train one (python -m bitnet_lit.train) or give "
            "checkpoint=<run or model folder>"
        )
    return max(models)[1]


def _may_be_on_the_hub(name: str) -> bool:
    owner, _, _ = name.partition("/")
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None
    return is_name and owner not in RUN_FOLDERS and not os.path.lexists(owner)


def _nothing_there(checkpoint: str, path: Path) -> str:
    """Say which part of a path does not exist, and suggest a similar name that does."""
    if path.is_symlink():
        return f"a link to {os.readlink(path)}, which is not there"
    parent, missing = path.parent, path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, missing = parent.parent, parent.name
    if not os.access(parent, os.R_OK | os.X_OK):
        return f"{parent} may not be read by you"
    near = difflib.get_close_matches(missing, sorted(os.listdir(parent)), n=1, cutoff=0.6)
    hint = f": did you mean {parent / near[0]}?" if near else ""
    return f"no such file or folder: no {missing!r} in {parent.absolute()}{hint}"


def _no_model(path: Path, key: str) -> str:
    """Say why there is no model at a path that exists, or what to give as the value of `key` instead."""
    if path.is_file():
        for each in map(formats().named, formats().names):
            if each.extension and path.suffix == each.extension:
                return f"{each.title} is written here and not read: give the model it was exported from"
        return REMEDIES.get(path.suffix, f"give the folder with {CONFIG_NAME} and {WEIGHTS_NAME}")
    if not os.access(path, os.R_OK | os.X_OK):
        return "it may not be read by you: check its permissions"
    if (path / PICKLED_NAME).is_file():
        return f"{PICKLED_NAME} is a pickle, which is not opened here: convert it to safetensors"
    if runs := sorted(_models_below(path)):
        parents = [str(model.parent) for _, model in runs]
        if len(runs) == 1:
            return f"give the run in it: {parents[0]}"
        return f"it holds {len(runs)} runs with a model: give one of them, such as {parents[-1]}"
    if is_run(path):
        return "a run writes its first model after its first validation"
    if path.name == CHECKPOINTS and has_model(path.parent / MODEL):
        return f"give the run folder: {path.parent}"
    return f"give a run or model folder{_or_nothing(key)}"


def _or_nothing(key: str) -> str:
    """Return what leaving `key` out does, for the end of a line. A model that teaches has no default."""
    return {"checkpoint": ", or leave it out for the newest run", "init_from": ", or leave it out to begin anew"}.get(
        key, ""
    )


def find_model(checkpoint: str | Path | None, key: str = "checkpoint") -> Path:
    """Find the model folder, or the llama2.c file, that `checkpoint` names.

    Args:
        checkpoint: a run folder, a model folder, a file inside a model folder, a .pt or .bin of llama2.c, a model of
            the Hugging Face hub (owner/name), or None for the newest run below `outputs/`.
        key: the option that gave `checkpoint`, for error messages.

    Raises:
        UserError: the path does not exist or holds no model.
    """
    try:
        return _newest() if checkpoint is None else _find(str(checkpoint), key)
    except OSError as error:
        raise UserError(f"{key}={checkpoint}: cannot be read ({error.strerror}): check its permissions") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{key}={checkpoint!r}: not a path ({error}): give a run or model folder") from None


def _find(checkpoint: str, key: str) -> Path:
    if not checkpoint:
        raise UserError(f"{key}= is empty: give a run or model folder{_or_nothing(key)}")
    path = Path(checkpoint)
    if not path.exists() and (checkpoint == "~" or checkpoint.startswith("~/")):
        path = Path(os.path.expanduser(path))  # not every shell expands it after an =
    if not os.path.lexists(path) and _may_be_on_the_hub(checkpoint):
        return download_model(checkpoint)
    if not path.exists():
        raise UserError(f"{key}={checkpoint}: {_nothing_there(checkpoint, path)}")
    if path.is_file() and _reader(path) is not None:
        return path
    if path.is_file() and path.suffix in (".safetensors", ".json", ".model") and has_model(path.parent):
        return path.parent
    for folder in (path, path / MODEL):
        if has_model(folder):
            return folder
    raise UserError(
        f"{key}={checkpoint}: no model there ({CONFIG_NAME} and {WEIGHTS_NAME}, directly or in {MODEL}/): "
        f"{_no_model(path, key)}"
    )


def _reader(path: Path) -> type[Format] | None:
    """Return the format that reads files with this suffix; None where there is none."""
    registry = formats()
    return next((each for each in map(registry.named, registry.names) if path.suffix in each.read_suffixes), None)


def open_stored(path: Path) -> StoredModel:
    """Open the model folder or llama2.c file that `find_model` returned.

    Raises:
        UserError: a file is damaged, or the network is not supported.
    """
    try:
        if path.is_file():
            if (reader := _reader(path)) is None:
                raise UserError(f"{path}: {_no_model(path, key='checkpoint')}")
            return reader.open(path)
        raw = read_raw_config(path)
        if (network := network_in(raw)) is not None:
            raise UserError(
                f"{path}: holds a network of its user's own ({network}): formats and engines describe that of this "
                f"package; evaluate opens it: networks=[{network}]"
            )
        return open_model_folder(path, raw) if "bitnet_lit" in raw else open_hub_folder(path, raw)
    except UserError as error:
        raise type(error)(one_line(error, 500)) from None  # the message may quote long values of a damaged file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): check its permissions") from None
