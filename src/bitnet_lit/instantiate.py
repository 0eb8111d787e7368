"""Objects of classes that a config names: `_target_: <module>.<class>` and the arguments beside it.

Hydra's `instantiate` makes them, so `_partial_`, `_args_` and a `_target_` inside an argument mean what they mean in
every Hydra config. This module adds what a user of ours needs: errors in one line, with the key that was typed, and the
rule about run folders. A class that a run's config.yaml names is code, and the folder may be somebody else's; so on
`resume=` it is imported only if its user has named it again (`allow=[my_project]`), or if it is one of those that do
nothing but compute (`is_harmless`).
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from bitnet_lit.config.slots import TARGET
from bitnet_lit.errors import UserError, one_line

HARMLESS = re.compile(
    r"torch\.optim\.[A-Z]\w+|torch\.optim\.lr_scheduler\.[A-Z]\w+|"
    r"(lightning\.pytorch|pytorch_lightning)\.callbacks\."
    r"(EarlyStopping|LearningRateMonitor|DeviceStatsMonitor|Timer)"
)
"""Classes that read and write no file and call nothing that an argument names."""


def is_harmless(target: str) -> bool:
    """Whether a class only computes: an optimizer or schedule of PyTorch, or a callback of Lightning from a list."""
    return HARMLESS.fullmatch(target) is not None


def named_classes(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every `_target_` in plain data, at any depth: its dotted key and its value."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if name == TARGET:
                if value is not None:  # a group that takes a class, and has none
                    yield key, str(value)
            else:
                yield from named_classes(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from named_classes(value, f"{key}[{number}]")


def check_allowed(
    values: Mapping[str, Any], allowed: Sequence[str], where: str, typed: str, option: str = "allow"
) -> None:
    """Refuse plain data of a folder that names a class which its user has not named.

    Args:
        allowed: modules, packages and classes that the user trusts.
        where: the file, for the error.
        typed: what the user typed, for the error: its remedy goes on from it.
        option: the key by which the user names classes.

    Raises:
        UserError: with what to type, if the classes are trusted.
    """
    foreign = [
        target
        for _, target in named_classes(values)
        if not is_harmless(target) and not any(f"{target}.".startswith(f"{name}.") for name in allowed)
    ]
    if foreign:
        names = ",".join(dict.fromkeys([*allowed, *foreign]))
        raise UserError(
            f"{where}: names the class {foreign[0]}, and what a folder names is not imported by itself: if you trust "
            f"it: {typed} {option}=[{names}]"
        )


def _place(error: BaseException) -> str:
    """Where in a file of the user's own an error was raised, for one line."""
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path(__file__).parent))
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(libraries) and Path(frame.filename).is_file()
    ]
    return f", {Path(own[-1].filename).name} line {own[-1].lineno}" if own else ""


def locate(target: str, key: str) -> Any:
    """The class or function of the name `target`.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        return resolve_name(target)
    except Exception as error:  # whatever the user's module raises
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(
            f"{key}.{TARGET}={target}: cannot be imported ({type(cause).__name__}: {cause}{_place(cause)}): give "
            "<module>.<class> of a module in this folder, beside the --config-dir, on PYTHONPATH, or of a package"
        ) from error


def takes(target: Any, name: str) -> bool:
    """Whether a class or function has an argument of this name; of a class with `**options`, whether its base has."""
    constructors = [target]
    if inspect.isclass(target):
        constructors = [vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls)]
    for constructor in constructors:
        try:
            parameters = inspect.signature(constructor).parameters
        except (TypeError, ValueError):  # written in C
            return False
        if name in parameters:
            return True
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
    return False


def _plain(value: Any) -> Any:
    r"""Values with `\${` where `${` is meant as text: the config is resolved already, and Hydra resolves it again."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def instantiate(values: Mapping[str, Any], key: str, *arguments: Any, **options: Any) -> Any:
    """The object that `values` describe: `_target_`, and the arguments beside it.

    Args:
        key: where `values` stand in the config, for errors.
        arguments: further arguments, in front of those that `values` hold.
        options: further arguments by name; they win over those that `values` hold.

    Raises:
        UserError: no class is named, it cannot be imported or made; one line.
    """
    import hydra.utils

    if not isinstance(values, Mapping) or not isinstance(values.get(TARGET), str):
        raise UserError(f"{key}={values}: names no class: give {key}.{TARGET}=<module>.<class>")
    for name, target in named_classes(values, key):
        found = locate(target, name)
    found = locate(values[TARGET], key)
    try:
        make = hydra.utils.instantiate({"_convert_": "all", **_plain(values), "_partial_": True})
        if values.get("_partial_"):
            return functools.partial(make, *arguments, **options)
        return make(*arguments, **options)
    except UserError:
        raise
    except Exception as error:  # whatever the class raises
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        hint = ""
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(cause)):
            near = difflib.get_close_matches(unknown[1], list(inspect.signature(found).parameters), n=1)
            hint = f": did you mean {near[0]}?" if near else ""
        text = one_line(cause)
        why = f"{type(cause).__name__}: {text}{_place(cause)}"
        raise UserError(f"{key}: {values[TARGET]} cannot be made ({why}){hint}") from error
