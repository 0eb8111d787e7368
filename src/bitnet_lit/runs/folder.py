"""This module knows the files of a run folder and which run owns it. Two runs never share a folder.

::

    outputs/<date>/<time>/
      config.yaml          the whole config; the first file that a run writes
      metrics.csv          one row per logged step
      ternary_health.csv   shares of codes, flips and scale of each matrix at each validation
      samples.txt          sample texts at each validation
      metrics.json         the figures at the end; the file exists when the run is complete
      error.txt            why a job of a sweep failed, or at which step a signal stopped it
      checkpoints/         last.ckpt and best.ckpt, for resume
      model/               the best model so far
      model_last/          the last model, if it is not the best one
      .hydra/              the command, as Hydra records it (.hydra_resume/ for the last resume)

A process that trains in a folder holds a lock on it, which the system releases when the process ends. A new run does
not take a folder in which another run left anything that can be resumed or used. If a run died before its first
checkpoint, a new run removes its files, so the same command can be given again. Files that no run wrote are kept.

Every other package asks this module. So it imports neither PyTorch nor Hydra, and does not read what the files hold.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from bitnet_lit.errors import UserError, read_errors
from bitnet_lit.files.locks import lock
from bitnet_lit.files.regular_file import open_regular
from bitnet_lit.files.temporary_paths import remove_leftovers

OUTPUTS = Path("outputs")  # where runs lie unless the user names a folder
CONFIG_NAME = "config.yaml"
CSV_NAME = "metrics.csv"
HEALTH_NAME = "ternary_health.csv"
SAMPLES_NAME = "samples.txt"
METRICS_NAME = "metrics.json"
ERROR_NAME = "error.txt"
CHECKPOINTS = "checkpoints"
LAST, BEST = "last.ckpt", "best.ckpt"
MODEL, MODEL_LAST = "model", "model_last"
RECORD, RESUME_RECORD = ".hydra", ".hydra_resume"
SWEEP_RECORD = "multirun.yaml"  # in the folder of a sweep, which holds the folders of its jobs
_ASKING_SECONDS = 0.5  # a command that asks whether a run is running holds its lock for less

_BEGUN = (CSV_NAME, HEALTH_NAME, SAMPLES_NAME, "tensorboard/events.out.tfevents.*")
_RESULTS = (f"{CHECKPOINTS}/{LAST}", f"{CHECKPOINTS}/{BEST}", MODEL, MODEL_LAST, METRICS_NAME)


def results(folder: Path) -> list[str]:
    """Return the names of what a run left that can be resumed or used. Another run must not touch these."""
    return [name for name in _RESULTS if (folder / name).exists()]


def is_run(folder: Path) -> bool:
    """Return whether a run began in a folder, so whether its config.yaml was written by a run."""
    try:
        with open_regular(folder / CONFIG_NAME, "give another folder") as file:
            return b"\nrun_dir:" in file.read()
    except (OSError, UserError):
        return False


def is_taken(folder: Path) -> bool:
    """Return whether a folder belongs to another run: it holds results, or a process may be training in it now."""
    if results(folder):
        return True
    return is_run(folder) and not _is_free(folder)


def is_running(folder: Path) -> bool:
    """Return whether a process trains in a folder. Where the file system has no locks, that is not known: False."""
    return is_run(folder) and _is_free(folder) is False


def _is_free(folder: Path) -> bool | None:
    """Return whether no process holds the lock on a folder; None where that cannot be known."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        return lock(descriptor, shared=True)
    finally:
        os.close(descriptor)


def can_be_resumed(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint of a run."""
    return any((folder / CHECKPOINTS / name).is_file() for name in (LAST, BEST))


def _newest_to_resume() -> Path | None:
    """Return the run below outputs/ with the newest checkpoint; None where there is none."""
    written = []
    for last in OUTPUTS.rglob(f"{CHECKPOINTS}/{LAST}"):
        with contextlib.suppress(FileNotFoundError):  # it is being replaced
            written.append((last.stat().st_mtime, last.parent.parent))
    return max(written)[1] if written else None


def find_run(typed: str) -> tuple[Path, Path]:
    """Find the run that `resume=` names, and its checkpoint.

    Args:
        typed: a run folder, or a checkpoint in one: `<run folder>/checkpoints/best.ckpt`.

    Returns:
        The run folder, and the checkpoint to go on from: last.ckpt where `typed` is a run folder.

    Raises:
        UserError: there is no run, it cannot be resumed, or its folder cannot be read or written.
    """
    with read_errors(f"resume={typed}", "check its permissions"):
        return _find_run(typed)


def _find_run(typed: str) -> tuple[Path, Path]:
    if not typed:
        raise UserError("resume= is empty: give a run folder, or leave it out to start a new run")
    folder = Path(typed)
    checkpoint = folder / CHECKPOINTS / LAST
    if folder.suffix == ".ckpt" and not folder.is_dir():
        # A user in checkpoints/ may type the file's name alone.
        checkpoint = folder if folder.parent.name == CHECKPOINTS else Path(os.path.abspath(folder))
        if checkpoint.parent.name != CHECKPOINTS:
            raise UserError(
                f"resume={typed}: no run in it (it lies in no {CHECKPOINTS}/): give the folder that train wrote, or "
                "start again without resume"
            )
        folder = checkpoint.parent.parent
    if not (folder / CONFIG_NAME).is_file():
        around = [parent for parent in Path(os.path.abspath(folder)).parents if is_run(parent)]
        newest = around[0] if around else _newest_to_resume()
        hint = "" if newest is None else f" ({'the run' if around else 'the newest'} is {newest})"
        there = around or os.path.lexists(folder)
        what = f"no run in it ({CONFIG_NAME} is missing)" if there else "no such folder"
        raise UserError(
            f"resume={typed}: {what}: give the folder that train wrote{hint}, or start again without resume"
        )
    if not can_be_resumed(folder):
        raise UserError(
            f"resume={typed}: no checkpoint in it (it was stopped before its first one): start again without resume"
        )
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"resume={typed}: cannot be written: copy that folder to a place of your own, and resume the copy"
        )
    return folder, checkpoint


@contextlib.contextmanager
def locked(folder: Path, what: str = "another process is training") -> Iterator[bool]:
    """Hold a lock on the folder of a run or a sweep while the block runs.

    Args:
        what: what the other process does that holds the lock, for the error.

    Yields:
        Whether the lock is held; False where the file system has no locks, as on some network mounts.

    Raises:
        UserError: another process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)  # the folder itself is locked, so no lock file is left behind
    try:
        deadline = time.monotonic() + _ASKING_SECONDS
        while (taken := lock(descriptor)) is False and time.monotonic() < deadline:
            time.sleep(0.01)
        if taken is False:
            raise UserError(f"{folder}: {what} in this folder: wait until it has ended, or give another folder")
        yield bool(taken)
    finally:
        os.close(descriptor)


def check_free(folder: Path, is_locked: bool) -> list[Path]:
    """Make sure that a new run may take a folder. This process must have called `locked` for it.

    Args:
        is_locked: whether this process really holds the lock. Without it, a run that has no checkpoint yet may still be
            alive.

    Returns:
        The files that a run without a checkpoint left there, and config.yaml. The new run removes them in this order:
        config.yaml shows that a run wrote the others, so it is the last one.

    Raises:
        UserError: the folder holds a run, or a file that no run wrote and that a run would overwrite.
    """
    held, of_a_run, config = results(folder), is_run(folder), folder / CONFIG_NAME
    if of_a_run and (held or not is_locked):
        raise UserError(
            f"run_dir={folder}: holds a run already ({(held or [CONFIG_NAME])[0]}): go on with it by resume={folder}, "
            "or give another folder (hydra.run.dir=...)"
        )
    begun = [path for pattern in _BEGUN for path in sorted(folder.glob(pattern))]
    foreign = held or [path.relative_to(folder).as_posix() for path in (config, *begun) if path.exists()]
    if foreign and not of_a_run:
        raise UserError(
            f"run_dir={folder}: has a {foreign[0]} that no run wrote, and a run would write its own in its place: give "
            "a folder of its own (hydra.run.dir=...)"
        )
    return [*begun, config]


def clean(folder: Path) -> None:
    """Remove from a run folder that this process has locked what killed processes and a failed job left there."""
    if (folder / RECORD).is_dir():
        (folder / ERROR_NAME).unlink(missing_ok=True)
    for inside in (folder, folder / CHECKPOINTS):
        remove_leftovers(inside)
    for name in (LAST, BEST):
        (folder / CHECKPOINTS / f".{name}.tmp").unlink(missing_ok=True)  # written by an earlier version
