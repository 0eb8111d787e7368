"""A job of a sweep is known by its overrides, and its folder is named by those that the sweep varies.

    train -m experiment=demo quant=b158,none seed=1,2

    outputs/sweeps/quant-seed-09c2f1a3b8/        the sweep: the keys that vary, and a hash of everything else
      quant=b158__seed=1/                        a job
      quant=b158__seed=2/
      ...

So the same line finds the same folders again, and a line with more values finds those of the line before. The order in
which overrides are typed does not matter. A name is safe on every file system: it holds lower-case letters, digits and
`._+-=`, and is short. Where that loses something (capitals, slashes, a long list, a number of many digits), a hash of
the exact overrides ends the name, so two jobs never have one name, also where the file system ignores case.

How jobs are launched (`launcher`, `sweep.dry_run`, ...) does not change what they compute, so it names nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

LONGEST_JOB, LONGEST_SWEEP = 120, 60  # characters; file systems take 255 bytes
_HASH = 10  # hexadecimal digits
_EXACT = re.compile(r"[a-z0-9._+-]*[a-z0-9_+-]", re.ASCII)  # Windows drops a dot at the end
_FRACTION = re.compile(r"-?\d+\.\d+(e[+-]?\d+)?", re.ASCII)
_LIKE_A_HASH = re.compile(rf"-[0-9a-f]{{{_HASH}}}$")


def digest(text: str) -> str:
    """Return a short hash of a text, which is the same on every machine."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH]


def _text(value: Any) -> str:
    """Return a value as text, in one way for each value: 1e-2 and 0.01 are the same."""
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, default=str, separators=(",", ":"))


def _shown(text: str) -> str:
    """Return a number that six digits do not say, such as a search draws, with four digits; other text as it is."""
    if not _FRACTION.fullmatch(text) or float(f"{float(text):g}") == float(text):
        return text
    return f"{float(text):.4g}"


@functools.lru_cache(maxsize=10_000)
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _key(override: Override) -> str:
    removed = "~" if override.is_delete() else ""
    return removed + override.key_or_group + (f"@{override.package}" if override.package else "")


def is_of_the_run(override: str) -> bool:
    """Return whether an override says what a job computes, and not how the sweep launches its jobs."""
    key = _key(_parsed(override))
    return not key.startswith("sweep.") and key != "launcher"


def identity(overrides: Iterable[str]) -> dict[str, str]:
    """Return the overrides that say what a job computes, by key, sorted.

    Args:
        overrides: of one job, in Hydra's grammar, each with one value. The last one of a key counts.
    """
    found: dict[str, str] = {}
    for override in filter(is_of_the_run, overrides):
        found[_key(_parsed(override))] = _text(_parsed(override).value())
    return dict(sorted(found.items()))


def asks_for_dry_run(overrides: Iterable[str]) -> bool:
    """Return whether the overrides, in Hydra's grammar, set `sweep.dry_run`."""
    typed = {_key(override): override.value() for override in map(_parsed, overrides)}
    return str(typed.get("sweep.dry_run")).lower() in ("true", "1", "yes", "on")


def swept_keys(overrides: Iterable[str], params: Mapping[str, Any]) -> set[str]:
    """Return the keys that a sweep varies.

    Args:
        overrides: of the whole sweep, in Hydra's grammar.
        params: `hydra.sweeper.params`: the keys that a file such as conf/sweep/lr.yaml varies.
    """
    typed = [_parsed(override) for override in overrides]
    fixed = {_key(override) for override in typed if not override.is_sweep_override()}
    swept = {_key(override) for override in typed if override.is_sweep_override()}
    return swept | ({key.lstrip("+") for key in params} - fixed)


def _shortened(name: str, exact: str, longest: int, always: bool = False) -> str:
    """Return a name of safe characters and at most `longest`; it ends with a hash of `exact` unless it says it all."""
    safe = re.sub(r"[^A-Za-z0-9._+=-]+", "-", name)
    if safe == name and not always and len(name) <= longest and not _LIKE_A_HASH.search(name):
        return name
    return f"{safe[: longest - _HASH - 1].rstrip('.-_')}-{digest(exact)}"


def job_name(overrides: Iterable[str], swept: Collection[str]) -> str:
    """Return the name of a job's folder: `quant=b158__seed=1`.

    Args:
        overrides: of the job.
        swept: the keys that the sweep varies; if it varies none, every override of the job is in the name.
    """
    found = identity(overrides)
    named = {key: text for key, text in found.items() if key in swept} or found
    if not named:
        return "job"
    is_exact = all(
        _EXACT.fullmatch(part) and "__" not in part and not part.startswith("_") and not part.endswith("_")
        for item in named.items()
        for part in item
    )
    shown = {key: _shown(text) for key, text in named.items()}
    is_exact = is_exact and shown == named
    name = "__".join(f"{key}={text}" for key, text in shown.items())
    return _shortened(name, json.dumps(named), LONGEST_JOB, always=not is_exact)


def sweep_name(overrides: Iterable[str], params: Mapping[str, Any], may_grow: bool = True) -> str:
    """Return the name of a sweep's folder: the keys that it varies, and a hash of these keys and of all that is fixed.

    Args:
        overrides: of the whole sweep.
        params: `hydra.sweeper.params`.
        may_grow: whether the sweep goes on in its folder when it gets more values. The study of a search does not.
    """
    typed = list(overrides)
    swept = swept_keys(typed, params)
    fixed = identity(override for override in typed if not _parsed(override).is_sweep_override())
    fixed = {key: text for key, text in fixed.items() if key not in swept}
    exact: list[Any] = [sorted(swept), fixed]
    if not may_grow:
        values = {
            _key(override): override.input_line for override in map(_parsed, typed) if override.is_sweep_override()
        }
        exact.append(sorted({**{key: f"{key}={value}" for key, value in params.items()}, **values}.items()))
    return _shortened("-".join(sorted(swept)) or "job", json.dumps(exact), LONGEST_SWEEP, always=True)
