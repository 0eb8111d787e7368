"""The schema of a command says what each key holds: text, a list of texts, a whole number, any keys of the user's own.

`overrides.py` rewrites what was typed by this. Keys are dotted, as on the command line: `data.dir`.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from typing import Any

from hydra.conf import HydraConf

PATHS = frozenset(
    {
        "checkpoint",
        "data.cache_dir",
        "data.dir",
        "data.files",
        "data.tokenizer",
        "data_dir",
        "distill.teacher",
        "download_dir",
        "hydra.run.dir",
        "hydra.sweep.dir",
        "init_from",
        "out",
        "prompts",
        "resume",
        "run_dir",
        "runs",
        "source",
        "tokenizer",
    }
)
"""The keys that hold a path, or a list of paths. The schema says only that they hold text."""


@dataclasses.dataclass(frozen=True)
class TextKey:
    """Says how the value of a key that holds text is read."""

    optional: bool = False
    """Whether `null` means None."""
    is_list: bool = False
    """Whether the key holds a list of texts."""
    resolves: bool = False
    """Whether interpolations (`${...}`) are resolved, as in Hydra's own keys."""


def _hint_as_text(hint: Any) -> TextKey | None:
    """Return the TextKey for a field's type; None where the type holds no text."""
    if hint is str:
        return TextKey()
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and set(arguments) == {str, type(None)}:
        return TextKey(optional=True)
    if typing.get_origin(hint) is list and arguments == (str,):
        return TextKey(is_list=True)
    return None


def _walk(schema: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield every dotted key that is not a group, with its type."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if hint is Any:  # a group with several schemas (optim): its default is their base class
            hint = field.default_factory
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            for group in (hint, *hint.__subclasses__()):
                yield from _walk(group, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hint


@functools.cache
def text_keys(schema: type) -> dict[str, TextKey]:
    """Return every dotted key of a schema that holds text, including Hydra's own (`hydra.`)."""
    hydras = {key: _hint_as_text(hint) for key, hint in _walk(HydraConf, "hydra.")}
    ours = {key: _hint_as_text(hint) for key, hint in _walk(schema, "")}
    texts = {key: dataclasses.replace(text, resolves=True) for key, text in hydras.items() if text and not text.is_list}
    return texts | {key: text for key, text in ours.items() if text}


@functools.cache
def whole_keys(schema: type) -> frozenset[str]:
    """Return every dotted key of a schema that holds a whole number and no other type of value."""
    kinds = ({int}, {int, type(None)})
    return frozenset(key for key, hint in _walk(schema, "") if set(typing.get_args(hint) or (hint,)) in kinds)


@functools.cache
def open_slots(schema: type) -> tuple[str, ...]:
    """Return every dotted key below which any key may be set, with a trailing dot: `quant.settings.`"""
    return tuple(f"{key}." for key, hint in _walk(schema, "") if typing.get_origin(hint) is dict)
