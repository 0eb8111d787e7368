"""A registry finds classes by their names: quantization schemes and export formats. Users can add their own.

A registry knows a class by its `name` if the class is built in, if it was passed to `register`, if the user gives it as
<module>.<class>, or if an installed package has an entry point for it::

    [project.entry-points."bitnet_lit.schemes"]
    threshold = "my_package.schemes:Threshold"

A file that is opened can only give a name. It never causes an import of code that its user has not named or installed.
"""

from __future__ import annotations

import math
import sysconfig
import traceback
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Generic, TypeVar

from bitnet_lit.errors import UserError, nearest, one_line

T = TypeVar("T")
C = TypeVar("C")
_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def reason(error: BaseException) -> str:
    """Return what the user's own code raised: type, text, and the file and line of that code where it is known."""
    while error.__cause__ is not None:
        error = error.__cause__
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path(__file__).parent))
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(libraries) and Path(frame.filename).is_file()
    ]
    place = f", {Path(own[-1].filename).name} line {own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {one_line(error)}{place}"


def import_named(target: str, given: str) -> Any:
    """Import and return a class or function that the user names.

    Args:
        target: <module>.<class> or <module>.<function>.
        given: the option as the user gave it, for the error.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        return resolve_name(target)
    except Exception as error:  # importing the user's module can raise anything
        where = "a module in this folder, beside the --config-dir, on PYTHONPATH, or of a package"
        near = _similar(target)
        remedy = f"did you mean {near}?" if near else f"give <module>.<class> of {where}"
        raise UserError(f"{given}: cannot be imported ({reason(error)}): {remedy}") from error


def _similar(target: str) -> str | None:
    """Return the public name, of a module that is there, that is spelled almost like the last part of `target`."""
    path, _, name = target.rpartition(".")
    try:
        near = nearest(name, [each for each in dir(resolve_name(path)) if not each.startswith("_")])
    except Exception:  # importing the user's module can raise anything
        return None
    return f"{path}.{near}" if near and near != name else None


class Registry(Generic[T]):
    """A Registry holds the classes of one kind by their names.

    Args:
        base: the base class. Subclasses are frozen dataclasses whose fields are settings, with a class attribute
            `name`.
        what: the kind of class, for errors ("quantization scheme").
        key: the key that chooses a class on the command line ("quant.name").
        group: the group of entry points in which installed packages list their classes.
        remedy: the end of an error, which says how users name classes of their own.
        reserved: names that a setting may not have, because other keys beside the settings have them.
    """

    def __init__(
        self, base: type[T], what: str, key: str, group: str, remedy: str, reserved: Collection[str] = ()
    ) -> None:
        self._base, self._what, self._key, self._group, self._remedy = base, what, key, group, remedy
        self._reserved = frozenset(reserved)
        self.registered: dict[str, type[T]] = {}

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        """The entry points of installed packages, by their names. Reading them imports nothing."""
        return {point.name: point for point in entry_points(group=self._group)}

    def register(self, cls: C) -> C:
        """Add a class under its `name`, and return it, so that this can be used as a decorator.

        Raises:
            UserError: the class does not derive from the base, another class has its name, or a setting has the name of
                another key.
        """
        given: Any = cls
        name = getattr(given, "name", None)
        if not (isinstance(cls, type) and issubclass(given, self._base) and isinstance(name, str)):
            base = f"{self._base.__module__}.{self._base.__qualname__}"
            called = f"{cls.__module__}.{cls.__qualname__}" if hasattr(cls, "__qualname__") else repr(cls)
            raise UserError(f"{called} is no {self._what}: derive it from {base} and give it a name")
        if shared := sorted(self._reserved & {field.name for field in fields(given)}):
            raise UserError(f"{self._what} {name}: its setting {shared[0]} has the name of another key: rename it")
        taken = self.registered.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (given.__module__, given.__qualname__):
            raise UserError(
                f"{self._what} {name}: {taken.__module__}.{taken.__qualname__} has this name: choose another one"
            )
        self.registered[name] = given
        return cls

    @property
    def names(self) -> list[str]:
        """Every known name; those of installed packages come last."""
        return list(dict.fromkeys([*self.registered, *self._installed]))

    def named(self, name: str) -> type[T]:
        """Return the class with this name.

        Raises:
            UserError: the name is unknown, or the class of an installed package cannot be imported or registered.
        """
        if name not in self.registered and name in self._installed:
            self._take_installed(name)
        if name not in self.registered:
            raise UserError(f"{self._key}={name}: must be one of {', '.join(self.names)}; {self._remedy}")
        return self.registered[name]

    def _take_installed(self, name: str) -> None:
        point = self._installed[name]
        package = point.dist.name if point.dist else point.value
        try:
            found = point.load()
        except Exception as error:  # importing somebody else's package can raise anything
            raise UserError(
                f"{self._key}={name}: the package {package} names {point.value} for it, which cannot be imported "
                f"({reason(error)}): mend or remove that package"
            ) from None
        self.register(found)
        if found.name != name:
            raise UserError(
                f"{self._key}={name}: the package {package} names {point.value} for it, whose own name is "
                f"{found.name}: take {self._key}={found.name}, or give the entry point that name"
            )

    def imported(self, target: str, given: str) -> type[T]:
        """Import and register a class that the user names.

        Args:
            target: <module>.<class>.
            given: the option as the user gave it, for the error.

        Raises:
            UserError: there is no such module or class, or the class is of another kind.
        """
        found = import_named(target, given)
        self.register(found)
        return self.registered[found.name]


def with_settings(cls: type[T], settings: Mapping[str, Any], key: str) -> T:
    """Make an object of a registered class.

    Args:
        settings: values of the fields of `cls`; the others have their defaults.
        key: the option that chose the class, for the error ("quant=b158").

    Raises:
        UserError: the class has no such setting, or a value is refused.
    """
    # Under `from __future__ import annotations` the type of a field is a string, and otherwise the type itself.
    kinds = {
        field.name: getattr(field.type, "__name__", str(field.type))
        for field in fields(cls)  # type: ignore[arg-type]
    }
    for name, value in settings.items():
        if name not in kinds:
            has = ", ".join(kinds) or "none"
            raise UserError(f"{key}: has no setting {name} (={value!r}), its settings are: {has}")
        allowed = _TYPES.get(kinds[name])
        if allowed and (type(value) not in allowed or (type(value) is float and not math.isfinite(value))):
            raise UserError(f"{key}: {name}={value!r} must be of type {kinds[name]}")
    return cls(**settings)
