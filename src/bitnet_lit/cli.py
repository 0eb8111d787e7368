"""What all doors share with Hydra: compose the config, say what is wrong with it in one line, call one function."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from bitnet_lit import config as schema
from bitnet_lit.door import interruptions
from bitnet_lit.errors import TrainingStopped, UserError
from bitnet_lit.overrides import as_typed, quoted
from bitnet_lit.sweep import run_job

_PACKAGED = Path(__file__).parent / "conf"  # in a wheel
CONF_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "conf"  # in a checkout

# ValueError: Hydra's own for a group option that reads as a number (model=15).
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)  # a UserError is a ValueError

SCHEMAS = {
    "train": schema.TrainConfig,
    "prepare": schema.PrepareConfig,
    "infer": schema.InferConfig,
    "evaluate": schema.EvaluateConfig,
    "export": schema.ExportConfig,
    "plot": schema.PlotConfig,
    "bench": schema.BenchConfig,
}


def register_schemas() -> None:
    """Tell Hydra the dataclasses that conf/*.yaml names in its defaults lists."""
    store = ConfigStore.instance()
    for name, cls in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=cls)
    store.store(group="optim", name="adamw_schema", node=schema.AdamWConfig)
    store.store(group="optim", name="muon_schema", node=schema.MuonConfig)


def _check_keys(node: DictConfig, prefix: str = "") -> None:
    """Refuse a key that `+key=value` added and no code reads, wherever a dataclass says which keys there are."""
    schema = OmegaConf.get_type(node)
    fields = {field.name for field in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else None
    for key in map(str, node):
        if fields is not None and key not in fields and f"{prefix}{key}" != "hydra.env":  # Hydra's, in no schema
            raise UserError(f"unknown key '{prefix}{key}': nothing reads it; leave out +{prefix}{key}=...")
        if isinstance(child := node._get_node(key), DictConfig) and not child._is_none():
            _check_keys(child, f"{prefix}{key}.")


def to_object(cfg: DictConfig) -> Any:
    """The dataclass that a composed config describes; its own checks run here.

    OmegaConf's own to_object refuses the text `???`, its sign for a value that is missing; no key of ours is missing.

    Raises:
        UserError: a value that does not fit, or a key that `+key=value` added and no code reads.
    """
    _check_keys(cfg)

    def build(node: DictConfig, values: dict[str, Any], prefix: str) -> Any:
        for key in map(str, node):
            child = node._get_node(key)
            if isinstance(child, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(child)):
                values[key] = build(child, values[key], f"{prefix}{key}.")
            elif OmegaConf.is_missing(node, key) and not isinstance(child, StringNode):
                raise UserError(f"{prefix}{key}=???: give a value")
        return OmegaConf.get_type(node)(**values)  # type: ignore[misc]

    return build(cfg, cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)), "")


def compose(door: str, overrides: Sequence[str] = ()) -> Any:
    """The config of a door as a dataclass, from Python: `compose("train", ["model=15m", "seed=2"])`.

    Raises:
        UserError: an unknown key, a wrong type or a value that does not fit.
    """
    register_schemas()
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return to_object(hydra.compose(door, as_typed(SCHEMAS[door], overrides)))
    except COMPOSITION_ERRORS as error:
        raise UserError(_explain(door, error, overrides)) from error


def _known_keys(node: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a config."""
    keys = []
    for key, value in node.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _known_keys(value, f"{prefix}{key}.")
    return keys


# What people coming from other trainers type.
ALIASES = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "epochs": "max_steps",
    "steps": "max_steps",
    "T": "temperature",
}


def _nearest_key(door: str, key: str, overrides: Sequence[str]) -> str:
    """The known key or group most like `key`, in the config that the groups among `overrides` give."""
    groups = [item for item in overrides if re.fullmatch(r"[a-z_]+=[\w.]+", item) and not item.startswith(key + "=")]
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            cfg = hydra.compose(door, groups)
        except COMPOSITION_ERRORS:
            cfg = hydra.compose(door)
    known = _known_keys(OmegaConf.to_container(cfg, resolve=False))
    if key in known or (CONF_DIR / key).is_dir():
        return key
    *path, leaf = key.split(".")
    leaf = ALIASES.get(leaf, leaf)
    same_leaf = [name for name in known if name.split(".")[-1] == leaf]
    return same_leaf[0] if same_leaf else difflib.get_close_matches(".".join([*path, leaf]), known, n=1, cutoff=0.0)[0]


def _explain(door: str, error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's and OmegaConf's errors in one line, with the nearest right name."""
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    if not isinstance(error, COMPOSITION_ERRORS):
        return f"Hydra cannot read these options ({type(error).__name__}: {text})"
    cause = " ".join(str(error.__cause__ or error).split())
    cause = re.sub(r" (full_key|object_type|reference_type): .*", "", cause)
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' (?:is )?not in", text)
    if unknown:
        key = unknown.group(1)
        if (known := _nearest_key(door, key, overrides)) == key:
            return f"{key} has no such entry: add one with +{key}.<name>=<value>"
        return f"unknown key '{key}': did you mean '{known}'?"
    option = re.search(
        r"Could not find '([^']+?)/([^']*)' Available options in '[^']+': (.*?) Config search path", text
    )
    if option:
        group, name = option.group(1), option.group(2)
        available = [each for each in option.group(3).split() if not each.endswith("_schema")]
        near = difflib.get_close_matches(name, available, n=1, cutoff=0.0)
        return f"unknown {group}={name}: did you mean '{near[0]}'? ({', '.join(available)})"
    if several := re.search(r"Ambiguous value for argument '(.*?)' 1\. To use it as a list", text):
        key, _, typed = several.group(1).lstrip("+").partition("=")
        if (known := _nearest_key(door, key, overrides)) != key:
            return f"unknown key '{key}': did you mean '{known}'?"
        return f"{key}={typed}: {key} takes one value; a list is {key}=[{typed}], and a sweep over them needs -m"
    if "Could not override ''" in text:
        return "a value without a key: give key=value"
    if "Config group override must be" in text:
        return f"a group needs the name of an option (python -m bitnet_lit.{door} --help lists them)"
    merging = re.search(r"Error merging override (\S+)", text)
    if merging:
        return f"{merging.group(1)}: {cause}"
    if full_key := getattr(error, "full_key", None):
        return f"{full_key}: {cause}"
    return cause


def _divide(arguments: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """The command line in three: Hydra's flags, overrides, and whether it is a sweep.

    Raises:
        UserError: a flag that does not exist or that lacks its value.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}: --help lists flags and keys")

    parser.error = refuse  # type: ignore[method-assign]
    known = parser.parse_intermixed_args(list(arguments))
    if known.experimental_rerun is not None:
        raise UserError("--experimental-rerun: unpickles a file, which can run anything: give the overrides again")
    flags = [argument for argument in arguments if argument not in known.overrides and argument != "--"]
    return flags, known.overrides, known.multirun or "hydra.mode=MULTIRUN" in known.overrides


def _from_lightning(overrides: list[str]) -> list[str]:
    """The overrides with which Lightning starts a rank: it puts the run folder's name into quotes as it is."""
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
    door: str,
    task: Callable[[Any], Any],
    arguments: Sequence[str],
    defaults: Callable[[list[str]], list[str]] | None = None,
) -> None:
    """Run `task(config)` with the config that the arguments describe, or Hydra's own flags (--help, --cfg, ...).

    Args:
        door: name of the root config in conf/ and of its schema.
        task: called with the dataclass; what it returns is what a sweeper optimizes.
        arguments: the command line after the command's name.
        defaults: called with the overrides in Hydra's grammar; returns further ones, which those win over.

    Raises:
        UserError: whatever is wrong with the arguments.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come out to us instead of being printed by Hydra
    register_schemas()
    flags, overrides, sweep = _divide(arguments)
    failures: list[Exception] = []
    main_process = os.getpid()

    def job(cfg: DictConfig) -> Any:
        sys.argv = typed  # Lightning starts further ranks with the same command
        hydra_config = HydraConfig.get()

        def work() -> Any:
            try:
                _check_keys(cast(DictConfig, HydraConfig.instance().cfg))
                config = to_object(cfg)
            except COMPOSITION_ERRORS as error:
                raise UserError(_explain(door, error, overrides)) from None
            return task(config)

        if hydra_config.mode == RunMode.MULTIRUN:
            folders = Path(hydra_config.runtime.output_dir), Path(hydra_config.sweep.dir)
            result = run_job(work, *folders, os.getpid() == main_process)
            if result == float("inf"):
                failures.append(TrainingStopped("jobs of the sweep failed"))
            return result
        try:
            return work()
        except Exception as error:  # Hydra would print words of its own before it raises it again
            failures.append(error)

    spelled = as_typed(SCHEMAS[door], _from_lightning(overrides), sweep)
    spelled = [*(defaults(spelled) if defaults else []), *spelled]
    typed, sys.argv = sys.argv, [sys.argv[0], *spelled, *flags]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=door)(job)()
    except Exception as error:  # not the task's: what a job raises is kept in `failures`
        if interruptions:
            raise KeyboardInterrupt from None
        if isinstance(error, COMPOSITION_ERRORS):  # some of which are OSErrors
            raise UserError(_explain(door, error, overrides)) from None
        if isinstance(error, OSError):
            raise
        if not isinstance(error, BrokenProcessPool):
            raise UserError(_explain(door, error, overrides)) from error
        from bitnet_lit.training.sweep_table import SweepTable

        SweepTable.end()
        raise TrainingStopped(
            "a process of the sweep was killed, most likely for memory: take fewer (hydra.launcher.n_jobs)"
        ) from None
    finally:
        sys.argv = typed
    if failures:
        raise failures[0]


def advise(overrides: Sequence[str]) -> None:
    """`export --advise`: which targets a training config can reach, and what to change for the others."""
    from bitnet_lit.exports.targets import print_advice

    config = compose("train", ["run_dir=unused", *overrides])
    print_advice(config.model, config.quant)
