"""Every command runs through here: Hydra composes its config, errors become one line, and one function is called.

The command line is `key=value` overrides and Hydra's own flags. `run` serves the commands, `compose` serves Python. In
composed_config.py, what Hydra composed becomes the command's dataclass.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bitnet_lit import __version__
from bitnet_lit.composed_config import (
    CONF_DIR,
    SCHEMAS,
    check_keys,
    fit_mode,
    register_schemas,
    to_object,
    with_custom,
)
from bitnet_lit.config import TrainConfig
from bitnet_lit.did_you_mean import COMPOSITION_ERRORS
from bitnet_lit.errors import MESSAGES, UserError, disk_errors
from bitnet_lit.hydra_errors import explain
from bitnet_lit.overrides import as_typed, quoted
from bitnet_lit.runs import devices, own_folder  # noqa: F401  # their resolvers are named in conf/
from bitnet_lit.runs.job import Job, ResumableTask
from bitnet_lit.runs.job_names import asks_for_dry_run
from bitnet_lit.runs.launch import ProcessDied, why_it_died
from bitnet_lit.words_and_flags import key_for_flag, key_for_words


@contextmanager
def _second_hydra() -> Iterator[None]:
    """Let a config be composed while a command runs, whose Hydra is the one of the process, and keep that one."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = before


def compose(command: str, overrides: Sequence[str] = ()) -> Any:
    """Compose the config of a command in Python: `compose("train", ["model=15m", "seed=2"])` returns its dataclass.

    Raises:
        UserError: a key is unknown, a type is wrong, or a value does not fit.
    """
    register_schemas()
    if command == "train":  # the command sets the run folder to Hydra's, and here there is none
        overrides = [f"run_dir={TrainConfig.run_dir}", *overrides]
    try:
        with _second_hydra(), hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            spelled = with_custom(as_typed(SCHEMAS[command], overrides))
            cfg = hydra.compose(command, spelled)
            return to_object(fit_mode(cfg, spelled) if command == "train" else cfg)
    except COMPOSITION_ERRORS as error:
        raise UserError(explain(command, error, overrides, CONF_DIR)) from error


def _import_from(config_dir: str | None) -> None:
    """Make classes importable from the current directory and from the parent of --config-dir.

    `python -m` puts the current directory into `sys.path`; an installed command does not.
    """
    beside = [] if config_dir is None else [str(Path(config_dir).absolute().parent)]
    for folder in (*beside, os.getcwd()):  # the current directory comes first
        if folder not in sys.path:
            sys.path.insert(0, folder)


def _divide(command: str, arguments: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Split the command line into Hydra's flags and the overrides, and say whether it is a sweep.

    Args:
        command: whose keys an unknown flag may mean.

    Raises:
        UserError: a flag does not exist or lacks its value.
    """
    if "--version" in arguments:  # Hydra's parser would print its own
        print(f"bitnet-lit {__version__}")
        raise SystemExit(0)
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        words = key_for_flag(command, message, arguments, CONF_DIR) or "--help lists flags and keys"
        raise UserError(f"{message}: {words}")

    parser.error = refuse  # type: ignore[method-assign]
    known = parser.parse_intermixed_args(list(arguments))
    if known.package is not None and known.cfg is None:  # Hydra reads it beside --cfg alone
        refuse(f"unrecognized arguments: -p {known.package}")
    if known.experimental_rerun is not None:
        raise UserError("--experimental-rerun: it unpickles a file, which can run any code: give the overrides again")
    _import_from(known.config_dir)
    flags = [argument for argument in arguments if argument not in known.overrides and argument != "--"]
    return flags, known.overrides, known.multirun or "hydra.mode=MULTIRUN" in known.overrides


def _from_lightning(overrides: list[str]) -> list[str]:
    """Escape the run folder in the overrides of a rank that Lightning starts: Lightning quotes it without escapes."""
    if not any(override.startswith("hydra.job.name=train_ddp_process_") for override in overrides):
        return overrides
    key = "hydra.run.dir="
    return [
        key + quoted(override[len(key) + 1 : -1])
        if override.startswith(f'{key}"') and override.endswith('"')
        else override
        for override in overrides
    ]


def _was_writing_a_config(error: OSError) -> bool:
    """Return whether Hydra was writing its record of a command: an error of a write has no name of a file."""
    return any(frame.f_code.co_name in ("_save_config", "save") for frame, _ in walk_tb(error.__traceback__))


@contextmanager
def _errors_in_one_line(command: str, overrides: Sequence[str]) -> Iterator[None]:
    """Turn an error of Hydra or of a sweep in the block into one line. What a job raises is in `Job.failures`.

    Args:
        overrides: what was typed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MESSAGES) and not isinstance(error, ProcessDied):
            raise
        if isinstance(error, COMPOSITION_ERRORS):  # some of which are OSErrors
            raise UserError(explain(command, error, overrides, CONF_DIR)) from None
        if isinstance(error, OSError) and error.filename is None and not _was_writing_a_config(error):
            raise  # printing failed (--help)
        if isinstance(error, OSError):  # Hydra could not write the run folder
            with disk_errors("the run folder", refused="give another one (hydra.run.dir=..., hydra.sweep.dir=...)"):
                raise
        if not isinstance(error, BrokenProcessPool | ProcessDied):
            raise UserError(explain(command, error, overrides, CONF_DIR)) from error
        from bitnet_lit.runs.sweep_table import SweepTable

        if (status := SweepTable.end()) > 128:  # a signal ended the sweep before that process could handle it
            sys.exit(status)
        raise why_it_died(error) if isinstance(error, BrokenProcessPool) else error from None


def run(
    command: str,
    task: Callable[[Any], Any],
    arguments: Sequence[str],
    defaults: Callable[[list[str], bool], list[str]] | None = None,
    configure: Callable[[DictConfig], Any] = to_object,
    resumable: ResumableTask | None = None,
) -> None:
    """Run `task(config)` with the config that the arguments describe, or do what a flag of Hydra's asks (--help, ...).

    Args:
        command: name of the root config in conf/ and of its schema.
        task: called with the dataclass; a sweeper optimizes what it returns.
        arguments: the command line after the command's name.
        defaults: called with the overrides in Hydra's grammar and with whether they are a sweep's. It returns further
            overrides; the user's take precedence.
        configure: builds the dataclass from the composed config.
        resumable: how jobs of a sweep go on, and how they are tried dry; None where they leave nothing.

    Raises:
        UserError: the arguments are wrong.
        TrainingStopped: a job of a sweep failed, or one of its processes was killed.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises exceptions instead of printing them
    register_schemas()
    flags, overrides, sweep = _divide(command, arguments)
    if words := key_for_words(command, overrides, arguments, CONF_DIR):
        raise UserError(words)
    spelled = as_typed(SCHEMAS[command], _from_lightning(overrides), sweep)
    spelled = with_custom([*(defaults(spelled, sweep) if defaults else []), *spelled])
    is_dry = resumable is not None and asks_for_dry_run(spelled)
    flags += ["--multirun"] * (is_dry and not sweep)  # a run that is tried dry is a sweep of one job

    def build(cfg: DictConfig) -> Any:
        try:
            check_keys(cast(DictConfig, HydraConfig.instance().cfg))
            return configure(cfg)
        except COMPOSITION_ERRORS as error:
            raise UserError(explain(command, error, overrides, CONF_DIR)) from None

    of_a_run = [flag for flag in flags if flag not in ("-m", "--multirun")]
    job = Job(f"bitnet_lit.{command}", task, build, resumable, sys.argv, of_a_run)
    typed, sys.argv = sys.argv, [sys.argv[0], *spelled, *flags]
    try:
        with _errors_in_one_line(command, overrides):
            hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=command)(job)()
    finally:
        sys.argv = typed
        if resumable is not None:
            from bitnet_lit.runs.sweep_table import SweepTable

            SweepTable.abandon()
    if job.failures:
        raise job.failures[0]
