"""The run folder: the names in it, whose it is, and that two runs never share one.

::

    outputs/<date>/<time>/
      config.yaml          the whole config
      metrics.csv          one row per logged step
      ternary_health.csv   codes, flips and scale of each matrix at each validation
      samples.txt          stories on the way
      metrics.json         the figures at the end: they say that the run is complete
      checkpoints/         last.ckpt and best.ckpt, for resume
      model/               the best model so far (model_last/ too, when the run ends with another)

A process that trains in a folder holds a lock on it (`flock`, which ends with the process, however it ends). A new run
takes a folder only where no run left anything that could be resumed or used. Files of a run that died before its
first checkpoint make room: they cannot be gone on with, and the same command may be typed again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from bitnet_lit.atomic import remove_leftovers
from bitnet_lit.checkpoints.config_json import read_raw_config
from bitnet_lit.checkpoints.file_names import WEIGHTS_NAME
from bitnet_lit.errors import UserError
from bitnet_lit.training.checkpoint_file import BEST, LAST

CONFIG_NAME = "config.yaml"
CSV_NAME = "metrics.csv"
HEALTH_NAME = "ternary_health.csv"
SAMPLES_NAME = "samples.txt"
METRICS_NAME = "metrics.json"
CHECKPOINTS = "checkpoints"
MODEL, MODEL_LAST = "model", "model_last"

_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_OF_A_DEAD_RUN = (CONFIG_NAME, CSV_NAME, HEALTH_NAME, SAMPLES_NAME, "tensorboard/events.out.tfevents.*")
_RESULTS = (f"{CHECKPOINTS}/{LAST}", f"{CHECKPOINTS}/{BEST}", MODEL, MODEL_LAST, METRICS_NAME)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a run folder while the block runs; gives False where the file system knows no locks (network mounts).

    Raises:
        UserError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)  # the folder itself: no file is left behind
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is training in this folder: wait until it has ended, or give another run "
                "folder"
            ) from None
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def claim(folder: Path, is_locked: bool) -> None:
    """Make sure that an existing `folder`, which this process holds, is free for a new run.

    Args:
        is_locked: whether the lock is real; without one, a run that has no checkpoint yet may still be alive.

    Raises:
        UserError: it holds a run, or a config.yaml that no run wrote.
    """
    held = [name for name in _RESULTS if (folder / name).exists()]
    if held or ((folder / CONFIG_NAME).exists() and not is_locked):
        raise UserError(
            f"run_dir={folder}: holds a run already ({(held or [CONFIG_NAME])[0]}): go on with it by resume={folder}, "
            "or give another folder (hydra.run.dir=...)"
        )
    config = folder / CONFIG_NAME
    if config.exists() and "\nrun_dir:" not in config.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"run_dir={folder}: has a {CONFIG_NAME} that is not of a run: give a folder of its own")
    for pattern in _OF_A_DEAD_RUN:
        for path in folder.glob(pattern):
            path.unlink()


def clean(folder: Path) -> None:
    """Remove what killed processes had begun to write in a run folder that this process holds."""
    for inside in (folder, folder / CHECKPOINTS):
        remove_leftovers(inside)
    for name in (LAST, BEST):
        (folder / CHECKPOINTS / f".{name}.tmp").unlink(missing_ok=True)  # an earlier version's


def exported_step(folder: Path) -> int | None:
    """The optimizer step whose weights a model folder of a run holds; None where there is no whole one."""
    try:
        step = read_raw_config(folder)["bitnet_lit"]["info"]["step"]
    except (UserError, LookupError, TypeError):
        return None
    return step if isinstance(step, int) and (folder / WEIGHTS_NAME).is_file() else None
