"""Text that is typed behind `key=` on a command line arrives as typed.

Hydra reads `key=value` with a grammar of its own, in which commas, quotes, brackets and most signs mean something.
That is right for numbers, lists and sweeps, and wrong for a prompt or a path. So each override is spelled anew before
Hydra reads it: a key that holds text (the schema says so) gets its value in Hydra's quotes, with every sign that Hydra
or OmegaConf would read as its own escaped. The rules, for a command that has one value for each key:

- Text (`prompt`, `data.dir`, ...): every character is the text's. Only a value that is one whole string in Hydra's
  quotes, `'...'` or `"..."`, is left to Hydra: it means its content, and interpolations (`${...}`) in it are resolved.
  `null` is None where the key may be None.
- A list of texts (`stop`, `callbacks.sample_prompts`, ...): `[a, 'b, c', "\n"]` is a list as in YAML (or, where YAML
  cannot read it, in Hydra's grammar); anything else is one text, and nothing is the empty list.
- Hydra's own text (`hydra.run.dir`, ...): every character is the text's, and interpolations are resolved.
- Any other key: Hydra's grammar. Below an open slot (`quant.settings`) it needs no `+`.

In a sweep (`-m`) a value that Hydra reads as several, `a,b` or `choice(a,b)`, is a sweep; its elements follow the same
rules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from antlr4 import CommonTokenStream, InputStream
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf._utils import OmegaConfDumper, get_omega_conf_dumper

from bitnet_lit.errors import UserError

_LINE_END = re.compile("[\n\r\x85\u2028\u2029]")
_OVERRIDE = re.compile(r"(\+{0,2})([A-Za-z_$][\w$-]*(?:\.[\w$-]+)*)=(.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class TextKey:
    """How the text behind a key is read."""

    optional: bool = False
    """`null` means None."""
    is_list: bool = False
    resolves: bool = False
    """Interpolations in it are resolved: Hydra's own keys."""


def _hint_as_text(hint: Any) -> TextKey | None:
    """The TextKey of a field's type; None where it holds no text."""
    if hint is str:
        return TextKey()
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and set(arguments) == {str, type(None)}:
        return TextKey(optional=True)
    if typing.get_origin(hint) is list and arguments == (str,):
        return TextKey(is_list=True)
    return None


def _walk(schema: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every dotted key that is no group, and its type."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if hint is Any:  # a group with several schemas (optim): its default says their base class
            hint = field.default_factory
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            for group in (hint, *hint.__subclasses__()):
                yield from _walk(group, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hint


def _represent_text(dumper: OmegaConfDumper, text: str) -> yaml.ScalarNode:
    """A text in YAML. PyYAML writes Unicode's line ends as they are, and reads them as spaces: they need escapes."""
    if _LINE_END.search(text):
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
    return OmegaConfDumper.str_representer(dumper, text)


# What Hydra records of a command (.hydra/) and config.yaml of a run are written with this dumper.
get_omega_conf_dumper().add_representer(str, _represent_text)


@functools.cache
def text_keys(schema: type) -> dict[str, TextKey]:
    """Every dotted key of a schema that holds text, Hydra's own (`hydra.`) included."""
    hydras = {key: _hint_as_text(hint) for key, hint in _walk(HydraConf, "hydra.")}
    ours = {key: _hint_as_text(hint) for key, hint in _walk(schema, "")}
    texts = {key: dataclasses.replace(text, resolves=True) for key, text in hydras.items() if text and not text.is_list}
    return texts | {key: text for key, text in ours.items() if text}


@functools.cache
def open_slots(schema: type) -> tuple[str, ...]:
    """Every dotted key of a schema below which any key may be set (`quant.settings`), with the dot behind it."""
    return tuple(f"{key}." for key, hint in _walk(schema, "") if typing.get_origin(hint) is dict)


def _parse(override: str) -> Override | None:
    """The override as Hydra reads it; None where its grammar does not fit."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def quoted(text: str, resolves: bool = False) -> str:
    """Hydra's spelling of a text."""
    if not resolves:
        # OmegaConf reads \${ as ${, and halves the backslashes before it.
        text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return QuotedString(text, Quote.single).with_quotes()


def _is_quoted(value: str) -> bool:
    """Whether a value is one whole string in Hydra's quotes."""
    if len(value) < 2 or value[0] not in "'\"" or value[-1] != value[0]:
        return False
    override = _parse(f"key={value}")
    return override is not None and override.get_value_element_as_str()[0] in "'\""


def _texts(key: str, value: str) -> list[str] | None:
    """The elements of a typed list of texts; None where it is no list.

    Raises:
        UserError: it is a list, and cannot be read.
    """
    if not (value.startswith("[") and value.endswith("]")):
        return None
    texts: Any = None
    with contextlib.suppress(yaml.YAMLError):
        if not _LINE_END.search(value):  # which YAML would fold into spaces
            texts = yaml.load(value, yaml.BaseLoader)  # which reads every scalar as text
    if texts is None and (override := _parse(f"key={value}")) is not None:
        texts = override.value()
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        with contextlib.suppress(UnicodeDecodeError):  # JSON's two escapes for one sign become one
            return [text.encode("utf-16", "surrogatepass").decode("utf-16") for text in texts]
    raise UserError(f"{key}={value}: a list that cannot be read: put its texts in quotes: {key}=['...', '...']")


def _spelled(key: str, value: str, text: TextKey) -> str:
    """The value of one text key in Hydra's grammar."""
    if text.is_list:
        texts = _texts(key, value) if value else []
        return "[" + ",".join(map(quoted, [value] if texts is None else texts)) + "]"
    if _is_quoted(value) or (text.optional and value.lower() == "null"):
        return value
    return quoted(value, text.resolves)


def _sweep_elements(value: str) -> list[str]:
    """The elements of `a,b,c`, which Hydra can read, as they were typed."""
    lexer = OverrideLexer(InputStream(value))
    lexer.mode(OverrideLexer.VALUE_MODE)
    choices = OverrideParser(CommonTokenStream(lexer)).value().simpleChoiceSweep()
    return [] if choices is None else [element.getText() for element in choices.element()]


def _sweep_spelled(key: str, value: str, text: TextKey) -> str:
    """The value of one text key in a sweep."""
    override = None if text.resolves else _parse(f"key={value}")
    if override is None:
        if "," in value and not text.resolves and not (text.is_list and value.startswith("[")):
            raise UserError(
                f"{key}={value}: in a sweep (-m) a comma divides values, and these cannot be read: put each into "
                f"quotes of its own inside the shell's: \"{key}='...','...'\", or the one value: "
                f'"{key}={quoted(value)}"'
            )
        return _spelled(key, value, text)
    if elements := _sweep_elements(value):
        return ",".join(_spelled(key, _unescaped(element), text) for element in elements)
    return value if override.is_sweep_override() else _spelled(key, _unescaped(value), text)


def _unescaped(element: str) -> str:
    r"""An element of a sweep without Hydra's backslashes: `a\, b` is one element with a comma."""
    return element if _is_quoted(element) else re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", element)


def as_typed(schema: type, overrides: Sequence[str], sweep: bool = False) -> list[str]:
    """Overrides as typed, in Hydra's grammar.

    Args:
        schema: the dataclass of the command's config.
        overrides: `key=value` with Hydra's prefixes (`+`, `++`); anything else, such as `~key`, is returned as it is.
        sweep: whether a key may have several values.

    Raises:
        UserError: text that is no Unicode, no `key=value`, or a list that cannot be read.
    """
    keys = text_keys(schema)
    spelled = []
    for number, override in enumerate(overrides):
        try:
            override.encode()
        except UnicodeEncodeError:
            raise UserError(f"{override}: not a text in UTF-8: type it in the terminal's encoding") from None
        match = _OVERRIDE.fullmatch(override)
        if match is None:
            if _parse(override) is None:
                before = f'; if it belongs to the argument before it, quote both: "{overrides[number - 1]} {override}"'
                raise UserError(f"'{override}' is no key=value{before if number else ''}")
            spelled.append(override)
            continue
        prefix, key, value = match.groups()
        if key.startswith(open_slots(schema)):
            prefix = "++"  # Hydra's for a key that the schema does not know
        if key in keys:
            value = (_sweep_spelled if sweep else _spelled)(key, value, keys[key])
        elif _parse(f"key={value}") is None:
            value = quoted(value)  # then the schema refuses it, by the key's name
        spelled.append(f"{prefix}{key}={value}")
    return spelled


def _content(value: Any) -> Any:
    r"""A value as OmegaConf resolves it: `\${` in a text is `${`."""
    if isinstance(value, list):
        return [_content(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\\\$\{", lambda match: match[1][: len(match[1]) // 2] + "${", value)
    return value


def parsed(override: str) -> tuple[str, Any]:
    """Key and value of an override in Hydra's grammar; texts in the value are as they were typed.

    Raises:
        UserError: it is no `key=value`, or holds several values.
    """
    found = _parse(override)
    if found is None or found.is_sweep_override() or found.is_delete():
        raise UserError(f"{override}: must be key=value, with one value")
    return found.key_or_group, _content(found.value())


def readable(override: str) -> tuple[str, str]:
    """Key and value of an override in Hydra's grammar, the value as text, for tables."""
    key, _, text = override.lstrip("+").partition("=")
    found = _parse(override)
    if found is None or found.is_sweep_override() or not isinstance(found.value(), str):
        return key, text
    return key, _content(found.value())
