"""An export format as an object: everything that the rest of the project asks about it, in one file each.

A format says what it is called, which networks and schemes it can hold (an allow-list: a field of the network that it
does not know is refused by name), how it is written and read back, which other tool runs it, and how. `export` writes,
reads back, compares and renames; it compares no format's name.

A format of your own, in a file of your own::

    @dataclass(frozen=True)
    class Npz(Format):
        name = "npz"
        title = "numpy's archive"
        held = {**SIZES, "sub_norm": ANY}       # the fields of the network that it can hold
        compressed: bool = False                # settings.compressed=true

        def write(self, stored, out): ...       # -> one WrittenTensor for each tensor
        def reopen(self, out, stored): ...      # -> a StoredModel

and on the command line `formats=[my_project.Npz] format=npz`. An installed package names it by an entry point of the
group "bitnet_lit.formats".

This module imports no torch: the command line asks for a format's name before torch is imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.config.held import Held, refused_fields
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.model.tensors import unnamed_tensors
from bitnet_lit.registry import Registry, with_settings

if TYPE_CHECKING:
    from torch import Tensor

# Largest error of a stored value, relative to the largest magnitude in its tensor: half a step of its type.
FLOAT_ERRORS = {"f32": 0.0, "bf16": 2.0**-8, "f16": 2.0**-11}


@dataclass
class WrittenTensor:
    """One line of an export's table.

    Attributes:
        kind: the type that it is stored in, for the table.
        shape: of the weight itself, packed or not.
        nbytes: what it takes in the file, scales included.
        bound: the largest error that this type rounds a value by, over the largest magnitude; of a projection that is
            read back as codes, the largest relative error of its scale.
        error: what the comparison found; None where there was none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    bound: float
    error: float | None = None


@dataclass(frozen=True)
class Tool:
    """Another tool that runs what was written, to compare logits with.

    Attributes:
        packages: what must be installed for it.
        logits: of a path and ids, int64 (B, T) -> float32 (B, T, V).
    """

    name: str
    packages: tuple[str, ...]
    logits: Callable[[Path, Tensor], Tensor]


@dataclass(frozen=True)
class Format(ABC):
    """A way to write a model. Subclasses are frozen dataclasses whose fields are options.

    Attributes:
        name: what `format=` calls it.
        title: what it is, in a few words.
        aliases: further names that `format=` and export.targets take.
        held: the fields of a network that it can hold, with their values.
        tensor_names: its name for each tensor, by ours within a layer (`self_attn.q_proj.weight`) or outside of all;
            None where it takes our names.
        is_file: it is one file; otherwise a folder.
        extension: of such a file.
        read_suffixes: of files that `open` reads.
        weights: the file in its folder that `checkpoint=` takes; empty for the folder itself.
        library: what the hub calls the library that opens it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    held: ClassVar[Held] = MappingProxyType({})
    tensor_names: ClassVar[Mapping[str, str] | None] = None
    is_file: ClassVar[bool] = False
    extension: ClassVar[str] = ""
    read_suffixes: ClassVar[tuple[str, ...]] = ()
    weights: ClassVar[str] = ""
    library: ClassVar[str | None] = None

    @classmethod
    def targets(cls) -> tuple[Format, ...]:
        """The choices among its options that differ in what they can hold, for export.targets and --advise."""
        return (cls(),)

    @property
    def target(self) -> str:
        """What export.targets calls this choice of options."""
        return self.name

    @property
    def suffix(self) -> str:
        """What stands behind the model's name where `out=` is not given."""
        return f"{self.name}{self.extension}"

    def problems(self, config: ModelConfig, quant: QuantConfig) -> list[str]:
        """Why a model cannot be written, each with its remedy; empty where it can. Subclasses add to these."""
        found = refused_fields(config, self.held)
        if not found and self.tensor_names is not None:
            found = [f"{name}: a tensor that {self.title} has no name for" for name in self._unnamed(config)]
        return found

    def _unnamed(self, config: ModelConfig) -> list[str]:
        return unnamed_tensors(config, self.tensor_names or ())

    def tool_problems(self, config: ModelConfig, quant: QuantConfig) -> list[str]:
        """Why the tool that the format is for would not compute this model, though it can be written."""
        return []

    def tokenizer_problem(self, tokenizer: Tokenizer | None) -> str | None:
        """Why the tool that the format is for cannot encode text with a tokenizer as it was trained; None where it can,
        or where the format holds every tokenizer."""
        return None

    @property
    def tool(self) -> Tool | None:
        """The tool that runs what is written, to compare with."""
        return None

    @abstractmethod
    def write(self, stored: StoredModel, out: Path) -> list[WrittenTensor]:
        """Write a model, one tensor in memory at a time.

        Args:
            out: the path of the file, or an empty folder.

        Returns:
            One line for each tensor of `stored`, by its name.

        Raises:
            UserError: something that only the weights or the tokenizer show.
        """

    @abstractmethod
    def reopen(self, out: Path, stored: StoredModel) -> StoredModel:
        """What was written, as a model to be compared with `stored`, which it was written from."""

    @classmethod
    def open(cls, path: Path) -> StoredModel:
        """A file with one of `read_suffixes`.

        Raises:
            UserError: damaged, or of another kind.
        """
        raise UserError(f"{path}: {cls.title} is written here and not read: give the model it was exported from")

    def recognizes(self, path: Path) -> bool:
        """Whether a file at `out=` is of this format, so that a new one may take its place."""
        return False

    @classmethod
    def earlier_names(cls, folder: Path) -> set[str]:
        """The files that an export of the first version wrote, whose note lists none."""
        return set()

    def remark(self, stored: StoredModel) -> str | None:
        """What the user must know about what was written."""
        return None

    def how_to_run(self, repository: str, runs_there: bool) -> Iterator[str]:
        """A block of Markdown for each way to run it, for the model card.

        Args:
            repository: where it lies on the hub.
            runs_there: whether the format's tool computes this model.
        """
        checkpoint = f"<downloaded>/{self.weights}" if self.weights else repository
        yield (
            f'```sh\npython -m bitnet_lit.infer checkpoint={checkpoint} prompt="Once upon a time"\n```\n\n'
            f'```python\nimport bitnet_lit\n\nprint(bitnet_lit.load("{checkpoint}").generate("Once upon a time"))\n```'
        )


def scheme_problems(quant: QuantConfig) -> list[str]:
    """Conditions of every format that stores codes and scales, or their products, and a dense head."""
    found = []
    if not quant.scheme.is_plain:
        found.append(f"quant={quant.scheme.name}: its layer computes more than codes and scales: take format=latent")
    if quant.scheme.quantizes and "lm_head" not in quant.skip:
        found.append(f"quant.skip={quant.skip}: the head is dense there: add lm_head")
    return found


FORMATS: Registry[Format] = Registry(
    Format,  # type: ignore[type-abstract]  # its subclasses are registered
    what="export format",
    key="format",
    group="bitnet_lit.formats",
    remedy="name the class of your own format: formats=[<module>.<class>], or register it in Python",
)
_BUILT_IN = ("latent", "packed", "gguf", "llama2c")  # modules beside this one, each named as its format


@cache
def formats() -> Registry[Format]:
    """All formats: those of this folder, then those that users and installed packages add."""
    for module in _BUILT_IN:
        import_module(f"bitnet_lit.checkpoints.formats.{module}")
    known = FORMATS.registered
    FORMATS.registered = {**{name: known[name] for name in _BUILT_IN}, **known}
    return FORMATS


def format_class(name: str) -> type[Format]:
    """The class of a format, by its name or another name that it has.

    Raises:
        UserError: an unknown name.
    """
    registry = formats()
    others = {alias: cls for cls in registry.registered.values() for alias in cls.aliases}
    return others.get(name) or registry.named(name)


def make_format(name: str, options: Mapping[str, Any]) -> Format:
    """A format by its name and options.

    Raises:
        UserError: an unknown format, an option that it does not have, or a value that does not fit.
    """
    return with_settings(format_class(name), options, f"format={name}")


def all_targets() -> list[Format]:
    """What export.targets can name: every format, with each choice of options that matters to what it can hold."""
    registry = formats()
    return [choice for name in registry.names for choice in registry.named(name).targets()]


def target_named(name: str) -> Format:
    """The format that export.targets calls by a name.

    Raises:
        UserError: there is none.
    """
    targets = {choice.target: choice for choice in all_targets()}
    others = {alias: choice for choice in targets.values() for alias in choice.aliases}
    found = targets.get(name) or others.get(name)
    if found is None:
        raise UserError(f"export.targets={name}: must be one of {', '.join(targets)}")
    return found
