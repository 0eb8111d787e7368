"""Open slots: places of the config that take a class of the user's own.

Two kinds. A dictionary named `extra` (`callbacks.extra`, `logger.extra`, `trainer.extra`) stands beside typed keys and
holds what comes on top. A group (`optim`, `schedule`, `data`) is one of ours, whose keys are typed, or a class that
`_target_` names::

    # conf/optim/sgd.yaml of one's own: --config-dir conf optim=sgd
    _target_: torch.optim.SGD
    learning_rate: 0.1          # read here
    momentum: 0.9               # passed to the class, like every key that is not read here

While a config is composed, a group is open until one of our files names its schema in its defaults list
(`/hydra/schema/muon@_here_`): that closes it again, and unknown keys are refused. What is still open when the config
is complete is a class of the user's own (`Custom`), or a file of the user's own that sets keys of ours, which are
checked then.
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
    """A class of the user's own, and what it is made with."""

    _target_: str
    """<module>.<class>, or a function that returns the object."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Every other key of the group: what the class itself is given."""

    RENAMED: ClassVar[dict[str, str]] = {}
    """Names that a class may have for a key of ours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self._target_, str) or "." not in self._target_.strip("."):
            raise UserError(f"{self.OWNER}{TARGET}={self._target_}: give <module>.<class>")
        for theirs, ours in self.RENAMED.items():
            if theirs in self.arguments:
                raise UserError(f"{self.OWNER}{theirs}: is called {self.OWNER}{ours} here")

    @property
    def name(self) -> str:
        """What tables and model cards call it: the last part of `_target_`."""
        return self._target_.rpartition(".")[2]

    @property
    def call(self) -> dict[str, Any]:
        """What `instantiate` takes: `_target_` and the arguments."""
        return {TARGET: self._target_, **self.arguments}


C = TypeVar("C", bound=Custom)


def custom(cls: type[C], values: Mapping[str, Any]) -> C:
    """The `Custom` of a group's values as they stand in a config."""
    own = {each.name for each in fields(cls)} - {"arguments"}
    arguments = {key: value for key, value in values.items() if key not in own}
    return cls(**{key: value for key, value in values.items() if key in own}, arguments=arguments)


@dataclass(frozen=True)
class Group:
    """A group of the config that is one of ours or a class of the user's own.

    Args:
        schema: the dataclass of one of ours, from its values.
        custom: the dataclass of a class of the user's own.
    """

    schema: Callable[[Mapping[str, Any]], type]
    custom: type[Custom]

    def filled(self, name: str, values: Any) -> Any:
        """The dataclass that plain values describe; a dataclass is returned as it is.

        Raises:
            UserError: a value that does not fit.
            OmegaConfBaseException: a key that the schema does not have, or a value of another type.
        """
        if not isinstance(values, Mapping):
            return values
        if TARGET in values:
            return custom(self.custom, values)
        from omegaconf import OmegaConf

        schema = self.schema(values)
        typed = OmegaConf.merge(OmegaConf.create({name: OmegaConf.structured(schema)}), {name: dict(values)})
        made: Any = OmegaConf.to_container(typed, resolve=True)
        return schema(**made[name])


def as_values(config: Any) -> Any:
    """A config as plain data, with the keys that its user types: what config.yaml holds."""
    if is_dataclass(config) and not isinstance(config, type):
        values = {each.name: as_values(getattr(config, each.name)) for each in fields(config)}
        return {**values, **arguments} if (arguments := values.pop("arguments", None)) is not None else values
    if isinstance(config, Mapping):
        return {key: as_values(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [as_values(value) for value in config]
    return config
