"""This module makes the objects that a config names by `_target_: <module>.<class>`, with the arguments beside it.

Hydra's `instantiate` makes them, so `_partial_`, `_args_` and a `_target_` in an argument mean the same as in every
Hydra config. This module adds errors in one line, with the key that was typed, and a rule about run folders.

A class that is named in the config.yaml of a run is code, and the run folder may come from somebody else. So `resume=`
imports such a class only if the user names it again (`allow=[my_project]`), or if it is on a list of classes that only
compute (`is_harmless`).
"""

from __future__ import annotations

import functools
import inspect
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bitnet_lit.config.slots import TARGET
from bitnet_lit.errors import UserError, nearest
from bitnet_lit.registry import import_named, reason

HARMLESS = re.compile(
    r"torch\.optim\.[A-Z]\w+|torch\.optim\.lr_scheduler\.[A-Z]\w+|"
    r"(lightning\.pytorch|pytorch_lightning)\.callbacks\."
    r"(EarlyStopping|LearningRateMonitor|DeviceStatsMonitor|Timer)"
)
"""Classes that do not read or write files, and do not call functions that are named in their arguments."""


def is_harmless(target: str) -> bool:
    """Return whether a class only computes: a PyTorch optimizer or scheduler, or one of four Lightning callbacks."""
    return HARMLESS.fullmatch(target) is not None


def named_classes(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every `_target_` in plain data, at any depth, as its dotted key and its value."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if name == TARGET:
                if value is not None:  # None: the group can name a class, and does not
                    yield key, str(value)
            else:
                yield from named_classes(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from named_classes(value, f"{key}[{number}]")


def check_allowed(
    values: Mapping[str, Any], allowed: Sequence[str], where: str, typed: str, option: str = "allow"
) -> None:
    """Refuse the data of a folder if it names a class that the user has not named.

    Args:
        values: the data, as read from the folder.
        allowed: modules, packages and classes that the user trusts.
        where: the file, for the error.
        typed: what the user typed; the remedy in the error is this text with `option` added.
        option: the key by which the user names trusted classes.

    Raises:
        UserError: the data names such a class.
    """
    foreign = [
        target
        for _, target in named_classes(values)
        if not is_harmless(target) and not any(f"{target}.".startswith(f"{name}.") for name in allowed)
    ]
    if foreign:
        names = ",".join(dict.fromkeys([*allowed, *foreign]))
        raise UserError(
            f"{where}: names the class {foreign[0]}, and a class that a folder names is imported only if you allow it: "
            f"if you trust it: {typed} {shlex.quote(f'{option}=[{names}]')}"
        )


def locate(target: str, key: str) -> Any:
    """Import and return a class or function.

    Args:
        target: <module>.<class> or <module>.<function>.
        key: the key that has this `_target_`, for the error.

    Raises:
        UserError: it cannot be imported.
    """
    return import_named(target, f"{key}.{TARGET}={target}")


def takes(target: Any, name: str) -> bool:
    """Return whether a class or function has an argument of this name.

    A class whose constructor has `**options` passes them to its base class, so the base class is asked too.
    """
    constructors = [target]
    if inspect.isclass(target):
        constructors = [vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls)]
    for constructor in constructors:
        try:
            parameters = inspect.signature(constructor).parameters
        except (TypeError, ValueError):  # a function written in C has no signature
            return False
        if name in parameters:
            return True
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
    return False


def _plain(value: Any) -> Any:
    """Return values with every `${` escaped: the config is resolved, and Hydra would resolve such a text again."""
    if isinstance(value, str):
        from bitnet_lit.overrides import escaped  # imports Hydra

        return escaped(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def instantiate(values: Mapping[str, Any], key: str, *arguments: Any, **options: Any) -> Any:
    """Make the object that `values` describe by `_target_` and the arguments beside it.

    Args:
        values: `_target_` and arguments.
        key: the key of `values` in the config, for errors.
        arguments: positional arguments, which come before those in `values`.
        options: keyword arguments, which replace those of the same name in `values`.

    Raises:
        UserError: no class is named, the class cannot be imported, or making the object fails.
    """
    import hydra.utils

    if not isinstance(values, Mapping) or not isinstance(values.get(TARGET), str):
        raise UserError(f"{key}={values}: names no class: give {key}.{TARGET}=<module>.<class>")
    found = {name: locate(target, name) for name, target in named_classes(values, key)}[key]
    try:
        make = hydra.utils.instantiate({"_convert_": "all", **_plain(values), "_partial_": True})
        if values.get("_partial_"):
            return functools.partial(make, *arguments, **options)
        return make(*arguments, **options)
    except UserError:
        raise
    except Exception as error:  # the constructor can raise anything
        hint, why = "", reason(error)
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", why):
            name = unknown[1]
            near = nearest(name, list(inspect.signature(found).parameters))
            hint = f": did you mean {near}?" if near else ""
            if not near and name in values:
                raise UserError(
                    f"{key}.{name}={values[name]}: {values[TARGET]} has no such argument: leave it out, or where a "
                    f"YAML file sets it (experiment=, mode=) remove it: ~{key}.{name}"
                ) from error
        raise UserError(f"{key}: {values[TARGET]} cannot be made ({why}){hint}") from error
