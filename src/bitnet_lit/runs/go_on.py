"""The commands and overrides that go on with a run, for the sweep that does so and for users who paste them.

A class that the config of a run names is code, so `resume=` imports it only if it is named again (`instantiate.py`).
Whoever has just trained the run trusts these classes, and the commands here name them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnet_lit.config import TrainConfig
from bitnet_lit.errors import UserError
from bitnet_lit.files.plain_yaml import read_yaml
from bitnet_lit.instantiate import is_harmless, named_classes
from bitnet_lit.overrides import quoted, shortest
from bitnet_lit.runs.config_keys import natural
from bitnet_lit.runs.folder import CONFIG_NAME, METRICS_NAME, can_be_resumed, is_running
from bitnet_lit.runs.job_folder import job_folders, recorded_overrides
from bitnet_lit.runs.job_names import is_of_the_run

COMMAND = ("python", "-m", "bitnet_lit.train")


def foreign_classes(values: Mapping[str, Any]) -> list[str]:
    """Return the classes that a run's config names and `resume=` must be allowed to import, each once.

    Args:
        values: the config as plain data.
    """
    schemes = values.get("schemes")
    named = [target for _, target in named_classes(values)] + (schemes if isinstance(schemes, list) else [])
    return list(dict.fromkeys(target for target in named if not is_harmless(target)))


def resume_overrides(folder: str, classes: Sequence[str]) -> list[str]:
    """Return the overrides, in Hydra's grammar, that go on with a run which names classes of the user's own."""
    allowed = ",".join(map(quoted, classes))
    return [f"resume={quoted(folder)}", *([f"allow=[{allowed}]"] if classes else [])]


def command_to_resume(folder: Path, flags: Sequence[str] = ()) -> str:
    """Return the shell command that goes on with the run in a folder.

    Args:
        flags: flags of Hydra that it needs. The user's own modules may lie in the folder of --config-dir.
    """
    try:
        classes = foreign_classes(read_yaml(folder / CONFIG_NAME, ""))
    except UserError:  # the command itself will say what is wrong with the file
        classes = []
    return shlex.join([*COMMAND, *flags, f"resume={folder}", *([f"allow=[{','.join(classes)}]"] if classes else [])])


def commands_to_go_on(sweep_dir: Path, flags: Sequence[str]) -> list[str]:
    """Return a shell command for each job that is not complete. It resumes the job, or starts it in its own folder.

    It leaves out what only a sweep reads, such as launcher=. sweep= stays, because its file may set values of the job.

    Args:
        flags: the flags of Hydra with which the sweep was started, without that of a sweep.
    """
    commands = []
    for folder, found in sorted(job_folders(sweep_dir), key=lambda each: natural(each[0].as_posix())):
        if (folder / METRICS_NAME).exists() or is_running(folder):
            continue
        if can_be_resumed(folder):
            commands.append(command_to_resume(folder, flags))
        elif found is not None:  # None: the job's row says that it cannot be read
            overrides = filter(is_of_the_run, recorded_overrides(folder) or [])
            typed = [shortest(TrainConfig, override) for override in overrides]
            commands.append(shlex.join([*COMMAND, *flags, *typed, f"hydra.run.dir={folder}"]))
    return commands
