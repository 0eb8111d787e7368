"""An open slot is a place in the config that takes a class of the user's own.

There are two kinds. A dictionary named `extra` (`callbacks.extra`, `logger.extra`, `trainer.extra`) adds objects or
flags to those of the typed keys. A group (`model`, `data`, `optim`, `schedule`) either has typed keys of this package,
or names a class of the user's own by `_target_`::

    # conf/optim/sgd.yaml in a folder of your own: --config-dir conf optim=sgd
    _target_: torch.optim.SGD
    learning_rate: 0.1          # a key of `CustomOptim`
    momentum: 0.9               # passed to the class, like every key that `CustomOptim` does not have

Hydra accepts every key in such a group, until a file of this package names a schema in its defaults list
(`/hydra/schema/muon@_here_`). From then on unknown keys are refused. A group without a schema is checked when the
config is complete: it names a class of the user's own (`Custom`), or it is a file of the user's own that sets keys of
this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypeVar

from bitnet_lit.config.checks import Checked
from bitnet_lit.errors import UserError

TARGET = "_target_"


@dataclass
class Custom(Checked):
    """Custom names a class of the user's own, and has the arguments that it is made with.

    Raises:
        UserError: `_target_` is not <module>.<class>, or an argument has another name in this package.
    """

    _target_: str
    """<module>.<class>, or <module>.<function> of a function that returns the object."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Every other key of the group, with its value. The class gets them as arguments."""

    RENAMED: ClassVar[dict[str, str]] = {}
    """Names of arguments that have another name in this package, with that name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self._target_, str) or "." not in self._target_.strip("."):
            raise UserError(f"{self.OWNER}{TARGET}={self._target_}: give <module>.<class>")
        for theirs, ours in self.RENAMED.items():
            if theirs in self.arguments:
                raise UserError(f"{self.OWNER}{theirs}: is called {self.OWNER}{ours} here")

    @property
    def name(self) -> str:
        """The last part of `_target_`, for tables and model cards."""
        return self._target_.rpartition(".")[2]

    @property
    def call(self) -> dict[str, Any]:
        """`_target_` and the arguments, as `instantiate` takes them."""
        return {TARGET: self._target_, **self.arguments}


C = TypeVar("C", bound=Custom)


def custom(cls: type[C], values: Mapping[str, Any]) -> C:
    """Make a `Custom` from the values of a group, as the config has them."""
    own = {each.name for each in fields(cls)} - {"arguments"}
    arguments = {key: value for key, value in values.items() if key not in own}
    return cls(**{key: value for key, value in values.items() if key in own}, arguments=arguments)


@dataclass(frozen=True)
class Group:
    """A Group is a group of the config that either has typed keys or names a class of the user's own.

    Args:
        schema: returns the dataclass of the typed keys, given the values of the group.
        custom: the dataclass for a class of the user's own.
    """

    schema: Callable[[Mapping[str, Any]], type]
    custom: type[Custom]

    def filled(self, name: str, values: Any) -> Any:
        """Return the values of the group as a dataclass. A dataclass is returned unchanged.

        Raises:
            UserError: a value is refused.
            OmegaConfBaseException: the schema has no such key, or a value has another type.
        """
        if not isinstance(values, Mapping):
            return values
        if TARGET in values:
            return custom(self.custom, values)
        from omegaconf import OmegaConf

        schema = self.schema(values)
        typed = OmegaConf.merge(OmegaConf.create({name: OmegaConf.structured(schema)}), {name: dict(values)})
        made: Any = OmegaConf.to_container(typed)  # the values are resolved: a `${` in them is text
        return schema(**made[name])


def as_values(config: Any) -> Any:
    """Return a config as plain data, with the keys that its user types, as config.yaml stores it."""
    if is_dataclass(config) and not isinstance(config, type):
        values = {each.name: as_values(getattr(config, each.name)) for each in fields(config)}
        return {**values, **arguments} if (arguments := values.pop("arguments", None)) is not None else values
    if isinstance(config, Mapping):
        return {key: as_values(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [as_values(value) for value in config]
    return config
