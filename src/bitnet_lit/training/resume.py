"""A resumed run goes on from a checkpoint, with the config in its config.yaml.

That is the config the run began with, not today's defaults. Overrides on the command line change it.

A run folder may come from somebody else, so config.yaml is read as plain data. A class that it names (a `_target_`) is
imported only if the user names it too (`allow=`), or if it is known to be harmless (see `instantiate.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitnet_lit.config import DataConfig, TrainConfig
from bitnet_lit.config.network import import_schemes
from bitnet_lit.config.optim import OPTIMIZERS
from bitnet_lit.config.slots import TARGET, as_values
from bitnet_lit.config.training import GROUPS
from bitnet_lit.data.fetch import is_url
from bitnet_lit.did_you_mean import dotted_keys, unknown_key
from bitnet_lit.errors import UserError, one_line
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.files.json_shapes import Integer, Record
from bitnet_lit.files.plain_yaml import dump_yaml, read_yaml
from bitnet_lit.instantiate import check_allowed, named_classes
from bitnet_lit.overrides import parsed
from bitnet_lit.quant.schemes import SCHEMES
from bitnet_lit.runs.folder import CONFIG_NAME, find_run
from bitnet_lit.training.elastic import ACCUMULATION, BATCH, keep_step
from bitnet_lit.training.initialize import sizes_are_given
from bitnet_lit.training.plan import world_size
from bitnet_lit.training.start import read_start

_METRICS = Record({"steps": Integer(0, 2**63 - 1)})
_ONLY_AT_FIRST = ("mode", "experiment")  # groups that set keys of other groups
_OF_THE_START = ("init_from", "init_optimizer", "init_sub_norm")


def save_config(config: TrainConfig, run_dir: Path) -> None:
    """Write config.yaml: the whole config with every default filled in.

    Paths of shards and of the teacher become absolute; URLs stay. The arguments of a data module of the user's own are
    written as they were typed: the run's identity has them.

    `resume` is not written, so the folder of a resumed run is the same as that of an uninterrupted one.
    """
    values = as_values(config) | {"resume": None, "allow": []}
    for key in ("dir", "tokenizer", "cache_dir") if isinstance(config.data, DataConfig) else ():
        if values["data"][key] is not None and not is_url(values["data"][key]):
            values["data"][key] = str(Path(values["data"][key]).absolute())
    for corpus in values["data"].get("mix", {}).values() if isinstance(config.data, DataConfig) else ():
        corpus["dir"] = corpus["dir"] if is_url(corpus["dir"]) else str(Path(corpus["dir"]).absolute())
    if (teacher := values["distill"]["teacher"]) is not None and os.path.lexists(teacher):  # or one of the hub
        values["distill"]["teacher"] = os.path.abspath(teacher)
    with atomic_file(run_dir / CONFIG_NAME) as temporary:
        temporary.write_text(dump_yaml(values), encoding="utf-8")


def resume_config(resume: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the config that a resumed run goes on with.

    Args:
        resume: a run folder, or a checkpoint in one: `<run folder>/checkpoints/best.ckpt`.
        overrides: changes of single values, `key=value` in Hydra's grammar (`as_typed` writes it). A group such as
            optim=muon is refused, because it would make another run.

    Raises:
        UserError: there is no run folder, it holds nothing to resume from, or an override is not possible.
    """
    folder, _ = find_run(resume)
    path = folder / CONFIG_NAME
    saved = read_yaml(path, f"put the {CONFIG_NAME} there that the run began with")
    typed = [parsed(override) for override in overrides]
    schemes = saved.get("schemes", [])
    target = _check_classes(saved, path, resume, typed)
    try:
        cfg = OmegaConf.structured(TrainConfig)
        for name, group in GROUPS.items():
            values = saved[name] if isinstance(saved.get(name), dict) else {}
            if name == "optim" and TARGET not in values and values.get("name") not in OPTIMIZERS:
                what = f"optim.name is {values.get('name')!r}"
                raise UserError(f"{path}: damaged ({what}): put the {CONFIG_NAME} of the run there")
            cfg[name] = {} if TARGET in values else OmegaConf.structured(group.schema(values))
        cfg = OmegaConf.merge(cfg, _guarded(saved))
        before, ranks_before = _length(cfg.trainer), _ranks(cfg.trainer)
        before_on_a_rank = _on_a_rank(cfg)
        for override in overrides:
            _apply(cfg, override, resume)
        with sizes_are_given(f"resume={resume}", [key for key, _ in typed]):
            config: Any = _unguarded(OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:
        raise UserError(f"resume={resume}: {one_line(error)}") from None
    except (TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged ({one_line(error)}): put the {CONFIG_NAME} of the run there") from None
    if before != _length(config.trainer) and config.schedule.total_steps is None:
        key, value = before
        steps = value if key == "max_steps" else "<the steps that its plan printed>"
        raise UserError(
            f"resume={resume} with another length than trainer.{key}={value}: it would move the learning rate's curve: "
            f"add schedule.total_steps={steps} to keep the curve, or the new length to stretch it"
        )
    same = Path(config.run_dir).absolute() == folder.absolute()  # then run_dir stays as it was typed at first
    config = replace(config, resume=resume, run_dir=config.run_dir if same else str(folder))
    if _ranks(config.trainer) != ranks_before or config.trainer.devices in ("auto", "-1", -1):
        sequences = read_start(resume).sequences_per_step
        if before_on_a_rank * world_size(config.trainer) != sequences:  # else the ranks are as many as before
            config = keep_step(config, sequences, [key for key, _ in typed])
    # config.yaml keeps these names. They are set last, because making a TrainConfig imports the classes that it names.
    config.quant._target_ = config.quant._target_ or target
    config.schemes = schemes if isinstance(schemes, list) else []
    return config


def _length(trainer: Any) -> tuple[str, float]:
    """Return the key that says how long a run is, and its value: tokens or epochs, where they are given, or steps."""
    keys = ("max_tokens", "max_epochs", "max_steps")
    return next((key, value) for key in keys if (value := getattr(trainer, key)) is not None)


def _on_a_rank(cfg: Any) -> int:
    """Return the sequences of a step on one rank; 0 where the config of a class of the user's own does not say."""
    sizes = [OmegaConf.select(cfg, key) for key in (BATCH, ACCUMULATION)]
    return math.prod(size if isinstance(size, int) else 0 for size in sizes)


def _ranks(trainer: Any) -> tuple[Any, int]:
    """Return what decides the number of ranks."""
    return trainer.devices, trainer.num_nodes


def _check_classes(saved: dict[str, Any], path: Path, resume: str, typed: Sequence[tuple[str, Any]]) -> str | None:
    """Make sure that the user has named the classes that a saved config names, and import the schemes that were typed.

    A scheme that is already known (built in, registered, installed) is looked up by its name and not imported.

    Args:
        saved: the content of config.yaml. `schemes`, `allow` and `quant._target_` are removed from it.
        typed: keys and values that the user typed.

    Returns:
        `quant._target_` of the saved config.

    Raises:
        UserError: only the folder names a class, and the user does not.
    """
    saved.pop("schemes", None)  # they belong to the model that the run began with
    saved.pop("allow", None)
    allowed: list[str] = []
    for key, value in typed:
        names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        if key in ("schemes", "quant._target_"):
            import_schemes(names)
        if key in ("schemes", "allow"):
            allowed += names
        elif key.endswith(f".{TARGET}"):
            allowed.append(str(value))
        else:
            allowed += [target for _, target in named_classes(value)]
    quant = saved["quant"] if isinstance(saved.get("quant"), dict) else {}
    target = quant.pop(TARGET, None)
    known = target is None or (isinstance(target, str) and str(quant.get("name")) in SCHEMES.names)
    check_allowed({**saved, **({} if known else {"quant": {TARGET: target}})}, allowed, str(path), f"resume={resume}")
    if not known:
        import_schemes([str(target)])
    return target


def _apply(cfg: Any, override: str, resume: str) -> None:
    """Change one value of a saved config. In an open slot any key may be added, and null removes an entry."""
    key, value = parsed(override)
    present = OmegaConf.select(cfg, key, default=None)
    is_entry = OmegaConf.is_dict(present) and OmegaConf.get_type(present) is dict and key.count(".") > 1
    if (OmegaConf.is_dict(present) and not (is_entry and isinstance(value, dict | None))) or key in _ONLY_AT_FIRST:
        single = "such as trainer.max_steps=..." if key in _ONLY_AT_FIRST else f"{key}.<name>=..."
        raise UserError(
            f"resume={resume} with {override}: a resumed run keeps its {key}; override single values ({single}), or "
            f"start another run with init_from={resume}"
        )
    if key in _OF_THE_START and value != present:
        raise UserError(f"resume={resume} with {override}: it was for the start of the run: leave it out")
    try:
        OmegaConf.update(cfg, key, _guarded(value))
    except OmegaConfBaseException as error:
        if "not in" not in str(error):
            raise
        known = dotted_keys(OmegaConf.to_container(cfg))
        raise UserError(f"resume={resume}: {unknown_key('train', key, known)}") from None


# OmegaConf reads `${...}` as a reference and `???` as a missing value. A NUL character inside makes it leave such text
# alone. Neither YAML nor a command line can hold a NUL, so every NUL is one of these and can be removed again.
def _guarded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _guarded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_guarded(item) for item in value]
    if isinstance(value, str):
        return "\0???" if value == "???" else value.replace("${", "$\0{")
    return value


def _unguarded(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            setattr(value, field.name, _unguarded(getattr(value, field.name)))
        return value
    if isinstance(value, dict):
        return {key: _unguarded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_unguarded(item) for item in value)
    return value.replace("\0", "") if isinstance(value, str) else value
