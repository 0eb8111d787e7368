"""The config of a run is read by dotted keys here: `quant`, `optim.learning_rate`, or the last part: `hidden_size`.

Commands that compare runs name them by such keys. The config is plain data, as `read_yaml` returns it. It may come from
another version, so a key may be absent, and `ABSENT` stands for its value then.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bitnet_lit.errors import UserError, nearest, one_line

ABSENT = "-"
"""A table shows this where a config does not have a key."""

_FRACTION = re.compile(r"-?\d+\.\d+(e[+-]?\d+)?", re.ASCII)
_WHOLE = 10_000  # characters: a list of every layer has fewer
_NUMBER = re.compile(r"((?:^-)?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
_FIRST = ("model", "quant", "optim", "schedule", "data")
_WITHOUT_EFFECT = ("run_dir", "resume", "allow", "schemes", "compile", "logger", "callbacks", "export", "sweep")
"""Keys and groups that do not change what a run learns."""
_OF_TRAINING = (
    "shuffle",
    "shards_per_block",
    "batch_size",
    "max_train_sequences",
    "num_workers",
    "cache_dir",
    "cache_gib",
)
"""Keys of `data` that do not change what a run is validated on."""

_BEFORE_THE_KEY = {
    "model.residual_scales": False,
    "model.x0_scales": False,
    "model.value_embeddings": False,
    "quant.start_at": 0.0,
    "optim.cautious_weight_decay": False,
    "optim.normuon": False,
    "optim.normuon_beta2": 0.95,
    "schedule.weight_decay": "constant",
    "distill.teacher": None,
    "distill.cross_entropy_weight": 1.0,
    "distill.logits_weight": 1.0,
    "distill.temperature": 1.0,
    "distill.attention_weight": 0.0,
    "distill.attention_layer": -1,
    "distill.attention_heads": None,
}
"""Keys that versions after the second brought, with the values that say what runs did before."""
_OPEN = ("model", "optim", "schedule")  # groups whose keys are those of the user's own class, where they name one
_OF_ONE_OPTIMIZER = {"optim.normuon": "muon", "optim.normuon_beta2": "muon"}


def of_this_version(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config.yaml of a run with the keys that later versions brought, at the values that say what it did.

    So a sweep that was begun before an update and goes on after it is one sweep. A group of the user's own class
    (`_target_`) has none of these keys.
    """
    if not config:
        return config
    filled = {name: dict(group) if isinstance(group, dict) else group for name, group in config.items()}
    filled.setdefault("distill", {})
    for dotted, value in _BEFORE_THE_KEY.items():
        name, _, key = dotted.partition(".")
        group = filled.get(name)
        if not isinstance(group, dict) or (name in _OPEN and group.get("_target_") is not None):
            continue
        if group.get("name") == _OF_ONE_OPTIMIZER.get(dotted, group.get("name")):
            group.setdefault(key, value)
    return filled


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every value of a config by its dotted key. A list is one value, and an empty group has none."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def learned_from(config: dict[str, Any], *without: str) -> dict[str, str]:
    """Return the values that decide what a run learns, as text by dotted key.

    Args:
        without: groups and keys to leave out as well.
    """
    left_out = {*_WITHOUT_EFFECT, *without}
    return {
        key: _exact(value)
        for key, value in flat(config).items()
        if key not in left_out and key.partition(".")[0] not in left_out
    }


def validated_on(config: dict[str, Any]) -> dict[str, str]:
    """Return the values that decide on which sequences a run is validated, as text by dotted key."""
    data, model = (group if isinstance(group := config.get(name), dict) else {} for name in ("data", "model"))
    values = {key: value for key, value in flat(data, "data.").items() if value is not None}
    length = data.get("sequence_length") or model.get("max_position_embeddings")
    values |= {} if length is None else {"data.sequence_length": length}
    return {key: _exact(value) for key, value in values.items() if key.partition(".")[2] not in _OF_TRAINING}


def _exact(value: Any) -> str:
    """Return a value as text that no other value has; 1 and 1.0 are one value."""
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def value_of(config: dict[str, Any], key: str, absent: str = ABSENT) -> str:
    """Return the value of a key or a group as text that no other value has; `absent` where the config lacks the key.

    A group stands for its name, or for the class of the user's own that it names.
    """
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, dict):
        value = value.get("name", value.get("_target_"))
    return absent if value is None else _exact(value)


def shown_apart(values: Iterable[str]) -> dict[str, str]:
    """Return each value as a table shows it: a fraction with six digits, and a long text without its middle.

    Values that would look alike are shown whole.
    """
    short = {value: _short(value) for value in dict.fromkeys(values)}
    looks = Counter(short.values())
    return {value: text if looks[text] == 1 else one_line(value, _WHOLE) for value, text in short.items()}


def _short(value: str) -> str:
    is_rounded = _FRACTION.fullmatch(value) is not None and float(f"{float(value):g}") != float(value)
    return f"{float(value):g}" if is_rounded else one_line(value, 200)


def full_key(option: str, typed: str, configs: Iterable[dict[str, Any]]) -> str:
    """Return the dotted key that a user means: a key or a group as it stands, or the one key that ends with it.

    Args:
        option: the option that holds the key, for the message.

    Raises:
        UserError: no config has such a key, or several keys end with it.
    """
    known: dict[str, None] = {}
    for config in configs:
        for key in flat(config):
            parts = key.split(".")
            known |= dict.fromkeys(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    if typed in known or not known:
        return typed
    ending = [key for key in known if key.endswith(f".{typed}")]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise UserError(f"{option}={typed}: several keys end with it: give one of {', '.join(ending)}")
    near = nearest(typed, [*known, *(key.rpartition(".")[2] for key in known)])
    remedy = f"did you mean '{near}'?" if near else "config.yaml of a run has its keys"
    raise UserError(f"{option}={typed}: no run has this key: {remedy}")


def telling_keys(configs: Sequence[dict[str, Any]], over: Sequence[str]) -> list[str]:
    """Return the keys that tell the runs apart: few of them, groups first.

    A key is taken if it divides the runs further than those before it. So `quant` is taken, and `quant.name` is not.

    Args:
        over: keys that are left out.
    """
    values = [{key: value for key, value in learned_from(config).items() if key not in over} for config in configs]
    keys = sorted({key for each in values for key in each}, key=lambda key: (key.count("."), key))
    candidates = [*(group for group in _FIRST if group not in over), *keys]
    return dividing_keys(candidates, configs, [])


def dividing_keys(candidates: Iterable[str], configs: Sequence[dict[str, Any]], taken: Sequence[str]) -> list[str]:
    """Return the keys of `taken`, and each candidate that divides the runs further than the keys before it."""
    taken = [*taken]
    labels = [tuple(value_of(config, key) for key in taken) for config in configs]
    for key in candidates:
        finer = [(*label, value_of(config, key)) for label, config in zip(labels, configs, strict=True)]
        if len(set(finer)) > len(set(labels)):
            taken, labels = [*taken, key], finer
    return taken


def natural(name: str) -> list[tuple[float, str]]:
    """Return a sort key that puts 2 before 10, and 1e-05 before 0.002 before 0.01."""
    parts = _NUMBER.split(name)  # every second one is a number
    return [(float(part), "") if place % 2 else (0.0, part) for place, part in enumerate(parts)]
