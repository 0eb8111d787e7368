"""Hydra composes a config as a tree of keys. Here it gets its schema, is checked, and becomes the command's dataclass.

Hydra checks names and types of keys against the schema while it composes. What it lets through is refused here: a key
that `+key=value` added and nothing reads, and the value `???`. Ranges are checked by the dataclasses themselves.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, StringNode

from bitnet_lit import config as schema
from bitnet_lit.config import CustomData, CustomNetwork
from bitnet_lit.config.slots import TARGET
from bitnet_lit.config.training import GROUPS
from bitnet_lit.did_you_mean import words_for
from bitnet_lit.errors import UserError
from bitnet_lit.instantiate import locate, takes
from bitnet_lit.overrides import key_and_value

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


def with_custom(overrides: list[str]) -> list[str]:
    """Select the option `custom` of each group whose class an override gives, as in optim._target_=torch.optim.SGD."""
    keys = dict(map(key_and_value, overrides))
    return [f"{group}=custom" for group in GROUPS if f"{group}._target_" in keys and group not in keys] + overrides


def check_keys(node: DictConfig, prefix: str = "", command: str = "") -> None:
    """Refuse a key that `+key=value` added to a dataclass without such a field: no code would read it."""
    schema = OmegaConf.get_type(node)
    command = command or next((name for name, cls in SCHEMAS.items() if cls is schema), "")
    fields = {field.name for field in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else None
    for key in map(str, node):
        if fields is not None and key not in fields and f"{prefix}{key}" != "hydra.env":  # set by Hydra, in no schema
            words = words_for(command, f"{prefix}{key}") or f"nothing reads it; leave out +{prefix}{key}=..."
            raise UserError(f"unknown key '{prefix}{key}': {words}")
        if isinstance(child := node._get_node(key), DictConfig) and not child._is_none():
            check_keys(child, f"{prefix}{key}.", command)


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
    check_keys(cfg)

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
    """Return the config of a run without what a mode sets and a class of the user's own does not take.

    mode=smoke sets sizes of this package's network, such as model.hidden_size, and data.max_val_sequences. A network or
    data module of the user's own gets those that it has arguments for.

    Args:
        overrides: what was typed. A key that was typed stays.
    """
    mode = next((item.partition("=")[2] for item in reversed(overrides) if item.startswith("mode=")), None)
    path = CONF_DIR / "mode" / f"{mode}.yaml"
    own = {
        group: custom
        for group, custom in (("model", CustomNetwork), ("data", CustomData))
        if cfg[group].get(TARGET) is not None
    }
    if not own or not path.is_file():
        return cfg
    typed = dict(map(key_and_value, overrides))
    cfg, set_by_mode = copy.deepcopy(cfg), cast(DictConfig, OmegaConf.load(path))
    for group, custom in own.items():
        target = locate(cfg[group][TARGET], group)
        for key in set_by_mode.get(group, {}):
            # Without its one batch, mode=overfit would be another experiment: such a data module is refused.
            is_free = key in custom.__dataclass_fields__ or f"{group}.{key}" in typed or key == "max_train_sequences"
            if not is_free and not takes(target, key):
                cfg[group].pop(key, None)
    return cfg
