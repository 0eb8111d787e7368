"""A job of a sweep finds out from its folder what is left to do.

    done         metrics.json is there                              skipped
    running      a process holds the lock on the folder             left alone
    half done    a checkpoint is there                              goes on from it
    failed       error.txt is there, and no checkpoint              begins again
    new          none of these                                      begins

A signal that ends a sweep leaves a line in error.txt too, of the job that it stopped. That job has not failed.

A folder belongs to the job whose overrides Hydra recorded in it. If the same overrides now make another config than
the recorded one (a default or a YAML file has changed), old results are not taken for new ones: the job is refused.
"""

from __future__ import annotations

import contextlib
import enum
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bitnet_lit.errors import UserError, one_line
from bitnet_lit.files.foreign_json import read_json
from bitnet_lit.files.json_shapes import Number, Record
from bitnet_lit.gpu_errors import without_boilerplate
from bitnet_lit.quant.schemes import activation_bits_of
from bitnet_lit.runs.folder import CONFIG_NAME, ERROR_NAME, METRICS_NAME, RECORD, can_be_resumed, is_running
from bitnet_lit.runs.job_names import identity

OVERRIDES_NAME = "overrides.yaml"  # Hydra's
_LOSS = Record({"val/loss": Number()})
_FREE = ("run_dir", "resume", "allow", "sweep")  # where a job lies and how it is started, not what it computes
_STOPPED = re.compile(r"(?:TrainingStopped: )?(?:not started: |SIG[A-Z0-9]+ )")  # earlier versions named the class
_OPEN = ("callbacks.extra.", "logger.extra.", "trainer.extra.", "quant.settings.")


_BITS = "quant.activation_bits"


class State(enum.Enum):
    """Says how far a job is."""

    DONE = "done"
    RUNNING = "running"
    HALF_DONE = "half done"
    FAILED = "failed"
    NEW = "new"


def state(folder: Path) -> State:
    """Return the state of the job in a folder, which may not exist."""
    if (folder / METRICS_NAME).is_file():
        return State.DONE
    if is_running(folder):
        return State.RUNNING
    if can_be_resumed(folder):
        return State.HALF_DONE
    line = told(folder)
    return State.NEW if line is None or is_stop(line) else State.FAILED


def told(folder: Path) -> str | None:
    """Return the text of a job's error.txt, without what torch adds to a GPU's error; None where there is no file."""
    try:
        return without_boilerplate((folder / ERROR_NAME).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def is_stop(line: str) -> bool:
    """Return whether a line of error.txt tells of a job that was stopped or never began, which is no failure."""
    return _STOPPED.match(line) is not None


def recorded_overrides(folder: Path) -> list[str] | None:
    """Return the overrides that Hydra recorded in a job's folder; None where they are missing or damaged."""
    try:
        overrides: Any = OmegaConf.to_container(OmegaConf.load(folder / RECORD / OVERRIDES_NAME))
    except Exception:  # a process that was killed may leave a damaged file
        return None
    is_list = isinstance(overrides, list) and all(isinstance(item, str) for item in overrides)
    return overrides if is_list else None


def is_of(folder: Path, overrides: Iterable[str]) -> bool:
    """Return whether a folder belongs to the job with these overrides."""
    recorded = recorded_overrides(folder)
    return recorded is not None and _identity(recorded) == identity(overrides)


def _identity(recorded: list[str]) -> dict[str, str] | None:
    try:
        return identity(recorded)
    except Exception:  # no override in Hydra's grammar
        return None


def job_folders(sweep_dir: Path) -> Iterator[tuple[Path, dict[str, str] | None]]:
    """Yield every folder of a job below a sweep's folder, with the identity of its overrides (None: damaged)."""
    for record in sorted(sweep_dir.rglob(f"{RECORD}/{OVERRIDES_NAME}")):
        folder = record.parents[1]
        overrides = recorded_overrides(folder)
        yield folder, None if overrides is None else _identity(overrides)


def final_loss(folder: Path) -> float:
    """Return the validation loss at the end of a job that is done, in nats per token."""
    return float(read_json(folder / METRICS_NAME, _LOSS, "remove it, and start the sweep again")["val/loss"])


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), node


def _with_bits(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with the activation bits of their scheme, which earlier versions recorded and later ones do not."""
    if values.get(_BITS, 8) is None:
        with contextlib.suppress(UserError):  # a scheme of the user's own that is not imported yet
            return values | {_BITS: activation_bits_of(str(values.get("quant.name")))}
    return values


def check_unchanged(folder: Path, config: DictConfig) -> None:
    """Refuse results that another config made.

    Args:
        folder: of a job that is done or half done.
        config: what the job's overrides make now, without Hydra's own part.

    Raises:
        UserError: a value differs from Hydra's record in the folder. A key that only `config` has was added by a later
            version, unless it is in an open slot.
    """
    path = folder / RECORD / CONFIG_NAME
    try:
        was = dict(_flat(OmegaConf.to_container(OmegaConf.load(path), resolve=False)))
    except Exception as error:
        raise UserError(f"{path}: damaged ({one_line(error)}): give another hydra.sweep.dir") from None
    was, now = _with_bits(was), _with_bits(dict(_flat(OmegaConf.to_container(config, resolve=False))))
    for key in [*was, *(key for key in now if key.startswith(_OPEN))]:
        if key.partition(".")[0] not in _FREE and was.get(key) != now.get(key):
            raise UserError(
                f"{folder}: began with {key}={was.get(key)}, and the same overrides make it {now.get(key)} now (a "
                "default or a YAML file changed): give another hydra.sweep.dir to train anew, or the value as it was"
            )
