"""What all doors share: compose the config with Hydra, call one function, turn errors into one line.

Exit status: 0 done, 1 failed, 2 the user's input was wrong.

A job of a sweep (`-m`) that fails writes its reason to `error.txt` in its folder and lets the others run; the table
at the end of the sweep names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitnet_lit import config as schema
from bitnet_lit.errors import ModelError, ParityError, TrainingStopped, UserError

T = TypeVar("T")

_PACKAGED = Path(__file__).parent / "conf"  # in a wheel
CONF_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "conf"  # in a checkout

# ValueError: Hydra's own for a group option that reads as a number (model=15).
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)

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


def to_object(cfg: DictConfig) -> Any:
    """The dataclass that a composed config describes; its own checks run here.

    Raises:
        UserError: a value that does not fit, or a key that `+key=value` added and no code reads.
    """

    def check(node: DictConfig, prefix: str) -> None:
        fields = {field.name for field in dataclasses.fields(OmegaConf.get_type(node))}  # type: ignore[arg-type]
        for key in node:
            if key not in fields:
                raise UserError(f"unknown key '{prefix}{key!s}': nothing reads it; leave out +{prefix}{key!s}=...")
            if isinstance(child := node._get_node(key), DictConfig):
                check(child, f"{prefix}{key}.")

    check(cfg, "")
    return OmegaConf.to_object(cfg)


def compose(door: str, overrides: Sequence[str] = ()) -> Any:
    """The config of a door as a dataclass, from Python: `compose("train", ["model=15m", "seed=2"])`.

    Raises:
        UserError: an unknown key, a wrong type or a value that does not fit.
    """
    register_schemas()
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return to_object(hydra.compose(door, list(overrides)))
    except UserError:
        raise
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
    """The known key most like `key`, in the config that the groups among `overrides` give."""
    groups = [item for item in overrides if re.fullmatch(r"[a-z_]+=[\w.]+", item) and not item.startswith(key + "=")]
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            cfg = hydra.compose(door, groups)
        except COMPOSITION_ERRORS:
            cfg = hydra.compose(door)
    known = _known_keys(OmegaConf.to_container(cfg, resolve=False))
    *path, leaf = key.split(".")
    leaf = ALIASES.get(leaf, leaf)
    same_leaf = [name for name in known if name.split(".")[-1] == leaf]
    return same_leaf[0] if same_leaf else difflib.get_close_matches(".".join([*path, leaf]), known, n=1, cutoff=0.0)[0]


def _explain(door: str, error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's and OmegaConf's errors in one line, with the nearest right name."""
    text = " ".join(str(error).split())
    cause = " ".join(str(error.__cause__ or error).split())
    cause = re.sub(r" (full_key|object_type|reference_type): .*", "", cause)
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' (?:is )?not in", text)
    if unknown:
        key = unknown.group(1)
        return f"unknown key '{key}': did you mean '{_nearest_key(door, key, overrides)}'?"
    option = re.search(
        r"Could not find '([^']+)/([^'/]+)' Available options in '[^']+': (.*?) Config search path", text
    )
    if option:
        group, name, available = option.group(1), option.group(2), option.group(3).split()
        near = difflib.get_close_matches(name, available, n=1, cutoff=0.0)
        return f"unknown {group}={name}: did you mean '{near[0]}'? ({', '.join(available)})"
    if "Config group override must be" in text:
        return f"a group was given a number: put the option's name (python -m bitnet_lit.{door} --help lists them)"
    merging = re.search(r"Error merging override (\S+)", text)
    if merging:
        return f"{merging.group(1)}: {cause}"
    return cause


def _fail(error: BaseException, status: int) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)


def run_door(door: str, task: Callable[[Any], Any]) -> None:
    """Run `task(config)` with the config that the command line describes.

    Args:
        door: name of the root config in conf/ and of its schema.
        task: called with the dataclass; what it returns is what a sweeper optimizes.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come out to us instead of being printed by Hydra
    register_schemas()
    started = False

    def job(cfg: DictConfig) -> Any:
        nonlocal started
        started = True
        hydra_config = HydraConfig.get()
        if hydra_config.mode == hydra.types.RunMode.MULTIRUN:
            return _sweep_job(cfg, task, Path(hydra_config.runtime.output_dir))
        try:
            return task(to_object(cfg))
        except UserError as error:
            _fail(error, 2)
        except TrainingStopped as error:
            _fail(error, error.status)
        except (ModelError, ParityError) as error:
            _fail(error, 1)

    main = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=door)(job)
    try:
        main()
    except UserError as error:
        _fail(error, 2)
    except COMPOSITION_ERRORS as error:
        if started:
            raise
        _fail(UserError(_explain(door, error, sys.argv[1:])), 2)
    except KeyboardInterrupt:
        _fail(KeyboardInterrupt("interrupted"), 130)


def run_advice(overrides: Sequence[str]) -> None:
    """`export --advise`: which targets a training config can reach, and what to change for the others."""
    from bitnet_lit.artifacts.targets import print_advice

    try:
        config = compose("train", ["run_dir=unused", *overrides])
        print_advice(config.model, config.quant)
    except UserError as error:
        _fail(error, 2)


def _sweep_job(cfg: DictConfig, task: Callable[[Any], T], folder: Path) -> T | float:
    """One job of a sweep; a failure is noted, not raised, so that the others go on."""
    try:
        return task(to_object(cfg))
    except Exception as error:
        if not isinstance(error, UserError | TrainingStopped):
            import traceback

            traceback.print_exc()
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(line + "\n", encoding="utf-8")
        print(f"error: {folder}: {line}", file=sys.stderr)
        return float("inf")
