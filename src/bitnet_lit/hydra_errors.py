"""An error of Hydra or OmegaConf becomes one line here: what is wrong with the options, and what to type.

Their messages span several lines and name classes of theirs. So each kind is recognized by its text, and answered with
the nearest right key or option (`did_you_mean.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from bitnet_lit.did_you_mean import (
    COMPOSITION_ERRORS,
    composed,
    known_keys,
    unfit_optim_key,
    unknown_key,
    unknown_option,
)
from bitnet_lit.errors import UserError
from bitnet_lit.overrides import key_and_value


def _no_option_name(command: str, overrides: Sequence[str], conf_dir: Path) -> str:
    """Return the error line for an option of a group that Hydra reads as a number or a dictionary, as in quant=1.58."""
    for override in overrides:
        group, names = key_and_value(override)
        options = sorted(path.stem for path in (conf_dir / group).glob("*.yaml")) if group else []
        for name in names.split(","):  # those of a sweep
            if options and name not in options and (not name[:1].isalpha() or name in ("false", "true", "null")):
                return unknown_option(group, name, options)
    return f"a group needs the name of an option (python -m bitnet_lit.{command} --help lists them)"


def explain(command: str, error: Exception, overrides: Sequence[str], conf_dir: Path) -> str:
    """Return an error of Hydra or OmegaConf as one line.

    Args:
        overrides: the overrides that the user typed.
        conf_dir: the folder of the config files, from which the known keys are read.
    """
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    if not isinstance(error, COMPOSITION_ERRORS):
        return f"Hydra cannot read these options ({type(error).__name__}: {text})"

    def known(key: str) -> list[str]:
        groups = [
            item for item in overrides if re.fullmatch(r"[a-z_]+=[\w.]+", item) and not item.startswith(key + "=")
        ]
        return known_keys(command, conf_dir, groups)

    cause = " ".join(str(error.__cause__ or error).split())
    cause = re.sub(r" (full_key|object_type|reference_type): .*", "", cause)
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' (?:is )?not in", text)
    if unknown:
        key = unknown.group(1)
        if (full_key := getattr(error, "full_key", None)) and full_key.endswith(key):
            key = full_key
        keys = known(key)
        if key in keys:
            return f"{key} has no such entry: add one with +{key}.<name>=<value>"
        if command == "train" and (line := unfit_optim_key(key, overrides)):
            return line
        return unknown_key(command, key, keys, overrides)
    option = re.search(
        r"Could not find '([^']+?)/([^']*)' Available options in '[^']+': (.*?) Config search path", text
    )
    if option:
        return unknown_option(option.group(1), option.group(2), option.group(3).split())
    if several := re.search(r"Ambiguous value for argument '(.*?)' 1\. To use it as a list", text):
        key, typed = key_and_value(several.group(1))
        if key not in (keys := known(key)):
            return unknown_key(command, key, keys)
        default = OmegaConf.select(composed(command, conf_dir), key)
        takes_list = not isinstance(default, int | float | None) or key == "trainer.devices"  # a number or a list
        remedies = [f"a list is {key}=[{typed}]"] * takes_list + ["a sweep over them needs -m"] * (command == "train")
        return "; ".join([f"{key}={typed}: {key} takes one value", *([", and ".join(remedies)] if remedies else [])])
    if "Could not override ''" in text:
        return "a value without a key: give key=value"
    if "Config group override must be" in text:
        return _no_option_name(command, overrides, conf_dir)
    if directory := re.search(r"Additional config directory '(.*?)' not found", text):
        return f"--config-dir {directory.group(1)}: no such folder"
    merging = re.search(r"Error merging override (\S+)", text)
    if merging:
        key, typed = key_and_value(merging.group(1))
        if "is not a subclass of" in cause:  # a text for a group of keys
            inside = ", ".join(name for name in known(key) if name.startswith(f"{key}."))
            cause = f"{key} has keys of its own: {inside}"
        return f"{key}={typed}: {cause}"
    if full_key := getattr(error, "full_key", None):
        return f"{full_key}: {cause}"
    return cause
