"""`Format` is the interface of an export format; each format implements it in a file of its own.

A format has a name. It says which networks and schemes it can hold, how a model is written and read back, and which
other tool runs it. What it can hold is an allow-list: a field of the network that the format does not know is refused.
The rest of the project uses only this interface and never tests for a format's name.

You can add a format of your own in a file of your own::

    @dataclass(frozen=True)
    class Npz(Format):
        name = "npz"
        title = "numpy's archive"
        held = {**SIZES, "sub_norm": ANY}       # the fields of the network that it can hold
        compressed: bool = False                # settings.compressed=true

        def write(self, stored, out): ...       # -> one WrittenTensor for each tensor
        def reopen(self, out, stored): ...      # -> a StoredModel

On the command line it is used by `formats=[my_project.Npz] format=npz`. An installed package registers its formats by
entry points of the group "bitnet_lit.formats".

This module does not import torch, because the command line checks the format's name before torch is imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from bitnet_lit.errors import UserError, list_remedy
from bitnet_lit.model.tensors import unnamed_tensors
from bitnet_lit.registry import Registry, with_settings

if TYPE_CHECKING:
    from torch import Tensor

# Largest rounding error of each type, relative to the largest magnitude in the tensor.
FLOAT_ERRORS = {"f32": 0.0, "bf16": 2.0**-8, "f16": 2.0**-11}


@dataclass
class WrittenTensor:
    """Holds one row of an export's table of tensors.

    Attributes:
        name: the tensor's name in our state dict.
        kind: the type that it is stored in, as the table shows it.
        shape: the shape of the weight itself, whether it is packed or not.
        nbytes: its size in the file, including its scales.
        bound: the largest rounding error of this type, divided by the tensor's largest magnitude. For a projection that
            is read back as codes, it is the largest relative error of the scale.
        error: the error that the comparison found, in the same unit; None if there was no comparison.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    bound: float
    error: float | None = None


@dataclass(frozen=True)
class Tool:
    """Describes another tool that runs an export; its logits are compared with ours.

    Attributes:
        name: the tool's name in the report.
        packages: the Python packages that must be installed.
        logits: computes logits from the export's path and token ids: int64 (B, T) -> float32 (B, T, V).
    """

    name: str
    packages: tuple[str, ...]
    logits: Callable[[Path, Tensor], Tensor]


@dataclass(frozen=True)
class Format(ABC):
    """Writes models in one format. Subclasses are frozen dataclasses whose fields are the format's options.

    Attributes:
        name: the name for `format=`.
        title: what the format is, in a few words.
        aliases: further names for `format=` and export.targets.
        held: the fields of a network that the format can hold, each with the allowed values.
        tensor_names: our name of each tensor -> the format's name. Our name is the one within a layer
            (`self_attn.q_proj.weight`), or the whole name outside of the layers. None where the format uses our names.
        is_file: whether an export is one file; otherwise it is a folder.
        extension: the suffix of that file.
        read_suffixes: the suffixes of files that `open` reads.
        weights: the file in an exported folder that `checkpoint=` takes; empty where it takes the folder itself.
        instead: what holds any network of this package, for the line about a part that this format does not know.
        library: the hub's name (`library_name`) for the library that opens an export.
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
    instead: ClassVar[str] = "format=latent"
    library: ClassVar[str | None] = None

    @classmethod
    def targets(cls) -> tuple[Format, ...]:
        """Return one instance for each choice of options that differs in what it can hold."""
        return (cls(),)

    @property
    def target(self) -> str:
        """The name of this choice of options in export.targets."""
        return self.name

    @property
    def suffix(self) -> str:
        """The end of the default output name, which begins with the model's name."""
        return f"{self.name}{self.extension}"

    def problems(self, config: ModelConfig, quant: QuantConfig) -> list[str]:
        """List why a model cannot be written, each reason with its remedy; the list is empty if it can.

        Subclasses add reasons of their own.
        """
        found = refused_fields(config, self.held, remedy=self.instead)
        if not found and self.tensor_names is not None:
            found = [f"{name}: a tensor that {self.title} has no name for" for name in self._unnamed(config)]
        return found

    def _unnamed(self, config: ModelConfig) -> list[str]:
        return unnamed_tensors(config, self.tensor_names or ())

    def tool_problems(self, config: ModelConfig, quant: QuantConfig) -> list[str]:
        """List why the tool that the format is for would not compute this model, although it can be written."""
        return []

    def tokenizer_problem(self, tokenizer: Tokenizer | None) -> str | None:
        """Say why the tool that the format is for would not encode text as the given tokenizer does.

        The result is None where the tool encodes text in the same way, or the format holds every tokenizer.
        """
        return None

    @property
    def tool(self) -> Tool | None:
        """The tool that runs an export, for the comparison of logits; None where there is none."""
        return None

    @abstractmethod
    def write(self, stored: StoredModel, out: Path) -> list[WrittenTensor]:
        """Write a model, one tensor in memory at a time.

        Args:
            out: the path of the file, or an existing empty folder.

        Returns:
            One `WrittenTensor` for each tensor of `stored`.

        Raises:
            UserError: the weights or the tokenizer cannot be written in this format.
        """

    @abstractmethod
    def reopen(self, out: Path, stored: StoredModel) -> StoredModel:
        """Open an export at `out`, to compare it with `stored`, which it was written from."""

    @classmethod
    def open(cls, path: Path) -> StoredModel:
        """Open a file with one of `read_suffixes`.

        Raises:
            UserError: the file is damaged or of another kind, or this format is not read.
        """
        raise UserError(f"{path}: {cls.title} is written here and not read: give the model it was exported from")

    def recognizes(self, path: Path) -> bool:
        """Return whether an existing file at `out=` is of this format, so that an export may replace it."""
        return False

    @classmethod
    def earlier_names(cls, folder: Path) -> set[str]:
        """Return the names of the files that the first version exported, whose note does not list them."""
        return set()

    def remark(self, stored: StoredModel) -> str | None:
        """Return what the user must know about the export; None where there is nothing to say."""
        return None

    def next_command(self, out: Path, schemes: Sequence[str]) -> list[str]:
        """Return the words of a command that runs an export, to print; none where this project does not know one.

        Args:
            schemes: classes of the user's own that the export needed.
        """
        return []

    def how_to_run(self, repository: str, runs_there: bool) -> Iterator[str]:
        """Yield a block of Markdown for each way to run an export, for the model card.

        Args:
            repository: the repository on the hub (owner/name).
            runs_there: whether the format's tool computes this model.
        """
        checkpoint = f"<downloaded>/{self.weights}" if self.weights else repository
        yield (
            f'```sh\npython -m bitnet_lit.infer checkpoint={checkpoint} prompt="Once upon a time"\n```\n\n'
            f'```python\nimport bitnet_lit\n\nprint(bitnet_lit.load("{checkpoint}").generate("Once upon a time"))\n```'
        )


def infer_command(checkpoint: Path, schemes: Sequence[str]) -> list[str]:
    """Return the words of the command that generates text with a model of this project.

    Args:
        schemes: classes of the user's own that `infer` must be allowed to import.
    """
    command = ["python", "-m", "bitnet_lit.infer", f"checkpoint={checkpoint}", "prompt=Once upon a time"]
    return [*command, *([f"schemes=[{','.join(schemes)}]"] if schemes else [])]


def scheme_problems(quant: QuantConfig) -> list[str]:
    """List why a scheme does not fit formats that store codes and scales, or their products, and a dense head."""
    found = []
    if not quant.scheme.is_plain:
        found.append(f"quant={quant.scheme.name}: its layer computes more than codes and scales: take format=latent")
    if quant.scheme.quantizes and "lm_head" not in quant.skip:
        found.append(
            f"quant.skip={quant.skip}: this format stores a dense head: take format=latent, or train with lm_head in it"
        )
    return found


FORMATS: Registry[Format] = Registry(
    Format,  # type: ignore[type-abstract]  # its subclasses are registered
    what="export format",
    key="format",
    group="bitnet_lit.formats",
    remedy="name the class of your own format: formats=[<module>.<class>], or register it in Python",
)
_BUILT_IN = ("latent", "packed", "gguf", "llama2c")  # modules in this folder, each with the name of its format


@cache
def formats() -> Registry[Format]:
    """Return all formats: those of this folder, then those that users and installed packages add."""
    for module in _BUILT_IN:
        import_module(f"bitnet_lit.checkpoints.formats.{module}")
    known = FORMATS.registered
    FORMATS.registered = {**{name: known[name] for name in _BUILT_IN}, **known}
    return FORMATS


def format_class(name: str) -> type[Format]:
    """Return the class of a format by its name or an alias.

    Raises:
        UserError: the name is unknown.
    """
    registry = formats()
    others = {alias: cls for cls in registry.registered.values() for alias in cls.aliases}
    return others.get(name) or registry.named(name)


def make_format(name: str, options: Mapping[str, Any]) -> Format:
    """Make a format from its name and options.

    Raises:
        UserError: the format or an option is unknown, or a value does not fit.
    """
    return with_settings(format_class(name), options, f"format={name}")


def all_targets() -> list[Format]:
    """Return all formats that export.targets can name, one for each choice of options in `Format.targets`."""
    registry = formats()
    return [choice for name in registry.names for choice in registry.named(name).targets()]


def target_named(name: str) -> Format:
    """Return the format with this name in export.targets.

    Raises:
        UserError: the name is unknown.
    """
    targets = {choice.target: choice for choice in all_targets()}
    others = {alias: choice for choice in targets.values() for alias in choice.aliases}
    found = targets.get(name) or others.get(name)
    if found is None:
        remedy = list_remedy("export.targets", name)
        raise UserError(f"export.targets={name}: must be one of {', '.join(targets)}{remedy}")
    return found
