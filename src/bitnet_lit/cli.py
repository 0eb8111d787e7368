"""Every command runs through here: Hydra composes its config, errors become one line, and one function is called.

The command line is `key=value` overrides and Hydra's own flags. `run` serves the commands, `compose` serves Python.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, StringNode

from bitnet_lit import __version__
from bitnet_lit import config as schema
from bitnet_lit.config import CustomNetwork
from bitnet_lit.config.slots import TARGET
from bitnet_lit.config.training import GROUPS
from bitnet_lit.did_you_mean import COMPOSITION_ERRORS, words_for
from bitnet_lit.errors import MESSAGES, UserError, disk_errors
from bitnet_lit.hydra_errors import explain
from bitnet_lit.instantiate import locate, takes
from bitnet_lit.overrides import as_typed, key_and_value, quoted
from bitnet_lit.runs import devices, own_folder  # noqa: F401  # their resolvers are named in conf/
from bitnet_lit.runs.job import Job, ResumableTask
from bitnet_lit.runs.job_names import asks_for_dry_run
from bitnet_lit.runs.launch import ProcessDied, why_it_died
from bitnet_lit.words_and_flags import key_for_flag, key_for_words

_PACKAGED = Path(__file__).parent / "conf"  # in a wheel
CONF_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "conf"  # in a checkout

SCHEMAS = {
    "train": schema.TrainConfig,
    "prepare": schema.PrepareConfig,
    "infer": schema.InferConfig,
    "evaluate": schema.EvaluateConfig,
    "export": schema.ExportConfig,
    "report": schema.ReportConfig,
    "plot": schema.PlotConfig,
    "bench": schema.BenchConfig,
}


@functools.cache
def register_schemas() -> None:
    """Register with Hydra the dataclasses that the defaults lists in conf/*.yaml name, once in a process."""
    store = ConfigStore.instance()
    for name, cls in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=open_groups(cls))
    for name, cls in {
        "adamw": schema.AdamWConfig,
        "muon": schema.MuonConfig,
        "schedule": schema.ScheduleConfig,
        "data": schema.DataConfig,
        "model": schema.ModelConfig,
    }.items():
        node = OmegaConf.structured(cls)
        OmegaConf.set_struct(node, True)  # closes the group
        store.store(group="hydra/schema", name=name, node=node)  # groups below hydra/ are not listed as options


def open_groups(cls: type) -> DictConfig:
    """Return a command's schema, in which the groups that accept a user's own class take any key."""
    node: DictConfig = OmegaConf.structured(cls)
    if issubclass(cls, schema.TrainConfig):
        for group in GROUPS.keys() & node.keys():
            node[group] = {}
            OmegaConf.set_struct(node[group], False)
    return node


def _with_custom(overrides: list[str]) -> list[str]:
    """Select the option `custom` of each group whose class an override gives, as in optim._target_=torch.optim.SGD."""
    keys = dict(map(key_and_value, overrides))
    return [f"{group}=custom" for group in GROUPS if f"{group}._target_" in keys and group not in keys] + overrides


def _check_keys(node: DictConfig, prefix: str = "", command: str = "") -> None:
    """Refuse a key that `+key=value` added to a dataclass without such a field: no code would read it."""
    schema = OmegaConf.get_type(node)
    command = command or next((name for name, cls in SCHEMAS.items() if cls is schema), "")
    fields = {field.name for field in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else None
    for key in map(str, node):
        if fields is not None and key not in fields and f"{prefix}{key}" != "hydra.env":  # set by Hydra, in no schema
            words = words_for(command, f"{prefix}{key}") or f"nothing reads it; leave out +{prefix}{key}=..."
            raise UserError(f"unknown key '{prefix}{key}': {words}")
        if isinstance(child := node._get_node(key), DictConfig) and not child._is_none():
            _check_keys(child, f"{prefix}{key}.", command)


def _check_given(node: DictConfig, key: str, full_key: str) -> None:
    """Refuse the value `???`, which means "missing", for a key and for all keys below it."""
    child = node._get_node(key)
    if OmegaConf.is_missing(node, key) and not isinstance(child, StringNode):
        raise UserError(f"{full_key}=???: give a value")
    if isinstance(child, DictConfig) and not child._is_none():
        for name in map(str, child):
            _check_given(child, name, f"{full_key}.{name}")


def to_object(cfg: DictConfig) -> Any:
    """Build the dataclass that a composed config describes, which runs its checks.

    This replaces `OmegaConf.to_object`, which refuses every text `???` because it marks a missing value there. A text
    may be `???` here.

    Raises:
        UserError: a value does not fit, or `+key=value` added a key that no code reads.
    """
    _check_keys(cfg)

    def build(node: DictConfig, values: dict[str, Any], prefix: str) -> Any:
        for key in map(str, node):
            child = node._get_node(key)
            if isinstance(child, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(child)):
                values[key] = build(child, values[key], f"{prefix}{key}.")
            else:
                _check_given(node, key, f"{prefix}{key}")
        return OmegaConf.get_type(node)(**values)  # type: ignore[misc]

    return build(cfg, cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)), "")


def fit_mode(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the config of a run without the sizes that a mode sets and a network of the user's own does not take.

    mode=smoke sets sizes of this package's network, such as model.hidden_size. A class of the user's own gets those
    that it has arguments for.

    Args:
        overrides: what was typed. A size that was typed stays.
    """
    mode = next((item.partition("=")[2] for item in reversed(overrides) if item.startswith("mode=")), None)
    path = CONF_DIR / "mode" / f"{mode}.yaml"
    target = cfg.model.get(TARGET)
    if target is None or not path.is_file():
        return cfg
    typed = dict(map(key_and_value, overrides))
    cfg = copy.deepcopy(cfg)
    network = locate(target, "model")
    for key in cast(DictConfig, OmegaConf.load(path)).get("model", {}):
        if key not in CustomNetwork.__dataclass_fields__ and f"model.{key}" not in typed and not takes(network, key):
            cfg.model.pop(key, None)
    return cfg


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
        overrides = [f"run_dir={schema.TrainConfig.run_dir}", *overrides]
    try:
        with _second_hydra(), hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            spelled = _with_custom(as_typed(SCHEMAS[command], overrides))
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
    spelled = _with_custom([*(defaults(spelled, sweep) if defaults else []), *spelled])
    is_dry = resumable is not None and asks_for_dry_run(spelled)
    flags += ["--multirun"] * (is_dry and not sweep)  # a run that is tried dry is a sweep of one job

    def build(cfg: DictConfig) -> Any:
        try:
            _check_keys(cast(DictConfig, HydraConfig.instance().cfg))
            return configure(cfg)
        except COMPOSITION_ERRORS as error:
            raise UserError(explain(command, error, overrides, CONF_DIR)) from None

    of_a_run = [flag for flag in flags if flag not in ("-m", "--multirun")]
    job = Job(f"bitnet_lit.{command}", task, build, resumable, sys.argv, of_a_run)
    typed, sys.argv = sys.argv, [sys.argv[0], *spelled, *flags]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=command)(job)()
    except Exception as error:  # from Hydra and the sweeper: what the task raises is in `job.failures`
        if isinstance(error, MESSAGES) and not isinstance(error, ProcessDied):
            raise
        if isinstance(error, COMPOSITION_ERRORS):  # some of which are OSErrors
            raise UserError(explain(command, error, overrides, CONF_DIR)) from None
        if isinstance(error, OSError) and error.filename is None:  # printing failed (--help)
            raise
        if isinstance(error, OSError):  # Hydra could not write the run folder
            with disk_errors("the run folder", refused="give another one (hydra.run.dir=..., hydra.sweep.dir=...)"):
                raise
        if not isinstance(error, BrokenProcessPool | ProcessDied):
            raise UserError(explain(command, error, overrides, CONF_DIR)) from error
        from bitnet_lit.runs.sweep_table import SweepTable

        if (status := SweepTable.end()) > 128:  # a signal ended the sweep before that process could handle it
            sys.exit(status)
        raise why_it_died(error) if isinstance(error, BrokenProcessPool) else error from None
    finally:
        sys.argv = typed
        if resumable is not None:
            from bitnet_lit.runs.sweep_table import SweepTable

            SweepTable.abandon()
    if job.failures:
        raise job.failures[0]


def advise(overrides: Sequence[str]) -> None:
    """Print which export targets a model can reach, and what to change for the others (`export --advise`).

    Args:
        overrides: the keys of a training config, or the `checkpoint=` of a model that is there.
    """
    from bitnet_lit.exports.targets import print_advice

    if any(override.startswith("checkpoint=") for override in overrides):
        from bitnet_lit.checkpoints.locate import find_model, open_stored

        stored = open_stored(find_model(compose("export", overrides).checkpoint))
        return print_advice(stored.config, stored.quant)
    config = compose("train", overrides)
    print_advice(config.model, config.quant)
