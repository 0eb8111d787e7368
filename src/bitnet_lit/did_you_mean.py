"""This module turns a wrong option of a command into a one-line error that says what to type.

For a key that does not exist it tries these in order: what the key means in other trainers (`other_names.py`), a key
that is spelled almost the same, and last the command that prints all keys. A wrong suggestion is worse than none, so a
key is suggested only if it is very similar. Words and flags, which are no key=value, are in `words_and_flags.py`.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitnet_lit.config.optim import OPTIMIZERS
from bitnet_lit.errors import nearest
from bitnet_lit.other_names import ALIASES, FLAGS, KEYS, OPTION_WORDS, PATH_KEYS, WORDS
from bitnet_lit.overrides import key_and_value
from bitnet_lit.quant.schemes import SCHEMES

# Hydra raises a ValueError for an option of a group that is a number (model=15). A UserError is a ValueError too.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)


LAUNCHERS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
"""Launchers of Hydra -> the packages that have them."""


def dotted_keys(node: Any, prefix: str = "") -> list[str]:
    """Return every dotted key of a config, those of groups included."""
    keys = []
    for key, value in node.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += dotted_keys(value, f"{prefix}{key}.")
    return keys


def composed(command: str, conf_dir: Path, groups: Sequence[str] = ()) -> DictConfig:
    with hydra.initialize_config_dir(str(conf_dir), version_base="1.3"):
        try:
            return hydra.compose(command, list(groups))
        except COMPOSITION_ERRORS:
            return hydra.compose(command)


def known_keys(command: str, conf_dir: Path, groups: Sequence[str] = ()) -> list[str]:
    """Return every dotted key that a command accepts, and the name of every group.

    Args:
        groups: the options of groups that the user chose (`optim=muon`), because they can add keys.
    """
    keys = dotted_keys(OmegaConf.to_container(composed(command, conf_dir, groups), resolve=False))
    if command == "train":
        for option in sorted((conf_dir / "quant").glob("*.yaml")):  # the settings of every scheme
            keys += [f"quant.settings.{setting.name}" for setting in fields(SCHEMES.named(option.stem))]
        keys += [path.name for path in sorted(conf_dir.iterdir()) if path.is_dir()]
    has_a_key_of_its_own = ("quant.settings.weight_scale", "quant.settings.activation_bits")
    return list(dict.fromkeys(key for key in keys if key not in has_a_key_of_its_own))


def nearest_key(key: str, known: Sequence[str], least: float = 0.75) -> str | None:
    """Return the known key that `key` probably means, or None.

    `key` may be another trainer's name, be in another group, or be misspelled.

    Args:
        least: how alike two names must be, from 0 to 1. In a group that was typed they need not be that alike.
    """
    *path, leaf = key.replace("-", "_").split(".")
    parent = ".".join(path)
    leaves: dict[str, list[str]] = {}
    for name in known:
        leaves.setdefault(name.split(".")[-1], []).append(name)
    leaf = leaf if leaf in leaves else ALIASES.get(leaf, leaf)
    if leaf in known:
        return leaf

    def found(near: str | None) -> str | None:
        if near is None:
            return None
        inside = [name for name in leaves[near] if name.startswith(f"{parent}.")]
        return (inside or leaves[near])[0]

    if leaf in leaves:
        return found(leaf)
    siblings = [name.split(".")[-1] for name in known if name.rpartition(".")[0] == parent]
    inside = nearest(leaf, siblings, 0.6 if parent else least)
    return found(inside) or nearest(key, known, 0.85) or found(nearest(leaf, list(leaves), least))


def words_for(command: str, key: str) -> str | None:
    """Return what to use instead of a key that only other trainers have, or None."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if words := WORDS.get(command, {}).get(".".join(parts[:end])):
            return words
    return None


def shown(key: str, value: str) -> str:
    """Return key=value for a shell."""
    return f"{key}={value}" if re.fullmatch(r"[\w@%+:,./-]+", value) else f"{key}={shlex.quote(value)}"


def unknown_key(command: str, key: str, known: Sequence[str], typed: Sequence[str] = ()) -> str:
    """Return the error line for a key that does not exist.

    Args:
        typed: the overrides that the user typed. A key that has a value already is not what another tool's name means.
    """
    given = dict(map(key_and_value, typed))
    if words := words_for(command, key) or FLAGS.get(command, {}).get(key):
        return f"unknown key '{key}': {words}"
    if (ours := KEYS.get(command, {}).get(key)) is not None and ours not in given:
        return f"unknown key '{key}': did you mean '{ours}'?"
    if command == "train" and (own := re.fullmatch(r"(callbacks|logger)\.(\w+\.\w+)", key)):  # as in a Hydra template
        return f"unknown key '{key}': did you mean '{own[1]}.extra.{own[2]}'?"
    if near := nearest_key(key, known):
        return f"unknown key '{key}': did you mean '{near}'?"
    if command == "train" and key.startswith("trainer.") and key.count(".") == 1:
        return f"unknown key '{key}': other flags of Lightning's Trainer are trainer.extra.<flag>=..."
    return f"unknown key '{key}': python -m bitnet_lit.{command} --cfg job prints all keys"


def unfit_optim_key(key: str, overrides: Sequence[str]) -> str | None:
    """Return the error line for a key that only another optimizer has, or None.

    Args:
        key: the key, with its group or without.
        overrides: what the user typed; an experiment may have set the key.
    """
    leaf = key.removeprefix("optim.")
    owners = [name for name, cls in OPTIMIZERS.items() if leaf in {each.name for each in fields(cls)}]
    typed = dict(map(key_and_value, overrides))
    chosen = typed.get("optim", "")
    if "." in leaf or not owners or chosen in owners:
        return None
    if f"optim.{leaf}" in typed:
        return f"optim.{leaf} belongs to optim={owners[0]}, not to optim={chosen}" if chosen in OPTIMIZERS else None
    if experiment := typed.get("experiment"):
        return (
            f"experiment={experiment} sets optim.{leaf}, which belongs to optim={owners[0]}: leave out optim={chosen}, "
            f"or leave out experiment={experiment} and type the keys of its file that you want"
        )
    return None


# Where a group takes a class of the user's own.
_OWN_CLASS = {group: group for group in ("model", "data", "optim", "schedule", "quant")} | {
    group: f"{group}.extra.mine" for group in ("callbacks", "logger")
}


def unknown_option(group: str, name: str, available: Sequence[str]) -> str:
    """Return the error line for an option that a group does not have."""
    if group == "hydra" and name.startswith("launcher/") and (package := LAUNCHERS.get(name[9:])):
        return f"launcher={name[9:]}: needs the package {package}: pip install 'bitnet-lit[sweep]'"
    if words := OPTION_WORDS.get(f"{group}={name}"):
        return f"unknown {group}={name}: {words}"
    if group == "data" and os.path.isfile(name):
        return f"unknown data={name}: of a text shards are written first: python -m bitnet_lit.prepare source={name}"
    if (place := _OWN_CLASS.get(group)) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name):
        return f"unknown {group}={name}: a class of your own is {place}._target_={name}"
    near = nearest(name, available, 0.6)
    if (key := PATH_KEYS.get(group)) and ("/" in name or (near is None and os.path.exists(name))):
        return f"unknown {group}={name}: did you mean {shown(key, name)}?"
    if near:
        return f"unknown {group}={name}: did you mean '{near}'? ({', '.join(available)})"
    return f"unknown {group}={name}: must be one of {', '.join(available)}"
