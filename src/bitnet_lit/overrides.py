"""Overrides are rewritten here so that a text on the command line reaches the config exactly as it was typed.

Hydra reads `key=value` with its own grammar, in which commas, quotes, brackets and most other punctuation have a
meaning. That suits numbers, lists and sweeps, but not a prompt or a path. So each override is rewritten before Hydra
reads it. Where the schema says that a key holds text, the value is put into Hydra's quotes, and every character that
Hydra or OmegaConf would interpret is escaped. Where each key has one value, the rules are:

- Text (`prompt`, `data.dir`, ...): every character belongs to the text. The one exception is a value that is a whole
  string in Hydra's quotes, `'...'` or `"..."`: Hydra removes the quotes and resolves interpolations (`${...}`) in it.
  `null` is None where the key may be None.
- A path (`PATHS`) is text, and `~/` at its start is the home folder: not every shell expands it behind an `=`.
- A list of texts (`stop`, `callbacks.sample_prompts`, ...): `[a, 'b, c', "\n"]` is read as YAML, or in Hydra's grammar
  where YAML cannot read it. Any other value is a list of that one text, and an empty value is the empty list.
- A group that holds files takes them as its value: `data=my.txt` of `evaluate` is `data.files=my.txt`.
- Hydra's own text (`hydra.run.dir`, ...): every character belongs to the text, and interpolations are resolved.
- A whole number (`trainer.max_tokens`, ...) may have an exponent: `33e6`. Hydra would read a float.
- Any other key: the value is in Hydra's grammar. A key below an open slot (`quant.settings`) needs no `+`.

In a sweep (`-m`), `a,b` and `choice(a,b)` are several values, and each of them follows the same rules.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import yaml
from antlr4 import CommonTokenStream, InputStream
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf._utils import OmegaConfDumper, get_omega_conf_dumper

from bitnet_lit.errors import UserError
from bitnet_lit.key_types import PATHS, TextKey, open_slots, text_keys, whole_keys

_LINE_END = re.compile("[\n\r\x85\u2028\u2029]")
_WITH_EXPONENT = re.compile(r"(?<![\w.+-])\d[\d_]*(?:\.\d*)?[eE]\+?\d{1,2}(?![\w.])")
_OVERRIDE = re.compile(r"(\+{0,2})([A-Za-z_$][\w$-]*(?:\.[\w$-]+)*)=(.*)", re.DOTALL)


def _represent_text(dumper: OmegaConfDumper, text: str) -> yaml.ScalarNode:
    """Write a text as YAML. Unicode's line ends are escaped, because PyYAML would read them back as spaces."""
    if _LINE_END.search(text):
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
    return OmegaConfDumper.str_representer(dumper, text)


# This dumper writes Hydra's record of a command (.hydra/) and the config.yaml of a run.
get_omega_conf_dumper().add_representer(str, _represent_text)


def _whole(value: str) -> str:
    """Write numbers with an exponent, such as 33e6, without one where they are whole."""

    def write(match: re.Match[str]) -> str:
        number = Decimal(match[0].replace("_", ""))
        return f"{number:.0f}" if number == number.to_integral_value() else match[0]

    return _WITH_EXPONENT.sub(write, value)


def key_and_value(override: str) -> tuple[str, str]:
    """Return key and value of an override as they were typed, without Hydra's `+` before the key."""
    key, _, value = override.lstrip("+").partition("=")
    return key, value


def _parse(override: str) -> Override | None:
    """Parse an override with Hydra's grammar; return None where it does not fit."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def escaped(text: str) -> str:
    r"""Write `${` as `\${`, which OmegaConf reads as the text `${`. It halves the backslashes before it."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def quoted(text: str, resolves: bool = False) -> str:
    """Write a text in Hydra's quotes; unless `resolves` is set, `${` is escaped."""
    return QuotedString(text if resolves else escaped(text), Quote.single).with_quotes()


def _is_quoted(value: str) -> bool:
    """Return whether a value is one whole string in Hydra's quotes."""
    if len(value) < 2 or value[0] not in "'\"" or value[-1] != value[0]:
        return False
    override = _parse(f"key={value}")
    return override is not None and override.get_value_element_as_str()[0] in "'\""


def _texts(key: str, value: str) -> list[str] | None:
    """Return the elements of a typed list of texts; None where the value is not a list.

    Raises:
        UserError: the value is in brackets but cannot be read.
    """
    if not (value.startswith("[") and value.endswith("]")):
        return None
    texts: Any = None
    with contextlib.suppress(yaml.YAMLError):
        if not _LINE_END.search(value):  # YAML would fold line ends into spaces
            texts = yaml.load(value, yaml.BaseLoader)  # reads every scalar as text
    if texts is None and (override := _parse(f"key={value}")) is not None:
        texts = override.value()
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        with contextlib.suppress(UnicodeDecodeError):  # joins the two escapes that JSON uses for one character
            return [text.encode("utf-16", "surrogatepass").decode("utf-16") for text in texts]
    raise UserError(f"{key}={value}: a list that cannot be read: put its texts in quotes: {key}=['...', '...']")


def _at_home(key: str, text: str) -> str:
    """Return a text with the home folder in place of `~/` at its start, if the key holds a path."""
    return os.path.expanduser(text) if key in PATHS and text.startswith("~/") else text


def _spelled(key: str, value: str, text: TextKey) -> str:
    """Write the value of one text key in Hydra's grammar."""
    if text.is_list:
        texts = _texts(key, value) if value else []
        return "[" + ",".join(quoted(_at_home(key, each)) for each in ([value] if texts is None else texts)) + "]"
    if _is_quoted(value) or (text.optional and value.lower() == "null"):
        return value
    return quoted(_at_home(key, value), text.resolves)


def _sweep_elements(value: str) -> list[str]:
    """Return the elements of `a,b,c` as they were typed; the value must fit Hydra's grammar."""
    lexer = OverrideLexer(InputStream(value))
    lexer.mode(OverrideLexer.VALUE_MODE)
    choices = OverrideParser(CommonTokenStream(lexer)).value().simpleChoiceSweep()
    return [] if choices is None else [element.getText() for element in choices.element()]


def _sweep_spelled(key: str, value: str, text: TextKey) -> str:
    """Write the value of one text key of a sweep in Hydra's grammar."""
    override = None if text.resolves else _parse(f"key={value}")
    if override is None:
        if "," in value and not text.resolves and not (text.is_list and value.startswith("[")):
            raise UserError(
                f"{key}={value}: in a sweep (-m) a comma divides values, and these cannot be read: put each into "
                f"quotes of its own inside the shell's: \"{key}='...','...'\", or, if it is one value: "
                f'"{key}={quoted(value)}"'
            )
        return _spelled(key, value, text)
    if elements := _sweep_elements(value):
        return ",".join(_spelled(key, _unescaped(element), text) for element in elements)
    return value if override.is_sweep_override() else _spelled(key, _unescaped(value), text)


def _files_spelled(key: str, value: str, text: TextKey, sweep: bool) -> str:
    """Write the files of a group as the value of the group.

    An empty value is an empty name, which is refused later: it may come from a shell's variable that is not set.
    """
    elements = _sweep_elements(value) if sweep and _parse(f"key={value}") is not None else []
    values = [_unescaped(element) for element in elements] or [value or "['']"]
    return ",".join("{files:" + _spelled(key, each, text) + "}" for each in values)


def _unescaped(element: str) -> str:
    r"""Remove Hydra's backslashes from an element of a sweep: `a\, b` is one element with a comma."""
    return element if _is_quoted(element) else re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", element)


def _behind(overrides: Sequence[str], word: str, keys: dict[str, TextKey]) -> str:
    """Return what a word without a key may belong to, for an error: the override before it."""
    if not overrides:
        return ""
    remedy = f'; if it belongs to the argument before it, quote both: "{overrides[-1]} {word}"'
    key, _, value = overrides[-1].partition("=")
    is_list = keys.get(key, keys.get(f"{key}.files", TextKey())).is_list
    return f"{remedy}, or give a list: {key}=[{value},{word}]" if is_list and not value.startswith("[") else remedy


def as_typed(schema: type, overrides: Sequence[str], sweep: bool = False) -> list[str]:
    """Rewrite overrides in Hydra's grammar so that every text arrives as it was typed.

    Args:
        schema: the dataclass of the command's config.
        overrides: `key=value` with Hydra's prefixes (`+`, `++`); anything else, such as `~key`, is not changed.
        sweep: whether a key may have several values.

    Raises:
        UserError: an override is not Unicode, is not `key=value`, or holds a list that cannot be read.
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
                raise UserError(f"'{override}' is no key=value{_behind(overrides[:number], override, keys)}")
            spelled.append(override)
            continue
        prefix, key, value = match.groups()
        if key.startswith(open_slots(schema)):
            prefix = "++"  # Hydra needs it to set a key that the schema does not know
        if key in whole_keys(schema):
            value = _whole(value)
        if key in keys:
            value = (_sweep_spelled if sweep else _spelled)(key, value, keys[key])
        elif f"{key}.files" in keys:  # the value of a group is a dictionary, or Hydra would take a text for an option
            value = _files_spelled(f"{key}.files", value, keys[f"{key}.files"], sweep)
        elif _parse(f"key={value}") is None:
            value = quoted(value)  # then the schema refuses it and names the key
        spelled.append(f"{prefix}{key}={value}")
    return spelled


def shortest(schema: type, override: str) -> str:
    """Return an override in Hydra's grammar in the shortest form that means the same when a user types it.

    Args:
        schema: the dataclass of the command's config.
        override: with one value, as `as_typed` returns it.
    """
    key, text = readable(override)
    prefix = override[: len(override) - len(override.lstrip("+"))]
    value = override.partition("=")[2]
    values = [text, value]
    if value.startswith("["):
        with contextlib.suppress(UserError):
            values = [value.replace("'", ""), value, json.dumps(parsed(override)[1])]
    for shorter in (f"{before}{key}={each}" for each in values for before in dict.fromkeys(("", prefix))):
        with contextlib.suppress(UserError):
            if as_typed(schema, [shorter]) == [override]:
                return shorter
    return override


def _content(value: Any) -> Any:
    r"""Return a value as OmegaConf resolves it: `\${` in a text becomes `${`."""
    if isinstance(value, list):
        return [_content(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\\\$\{", lambda match: match[1][: len(match[1]) // 2] + "${", value)
    return value


def parsed(override: str) -> tuple[str, Any]:
    """Return key and value of an override in Hydra's grammar; texts in the value are as they were typed.

    Raises:
        UserError: the override is not `key=value`, or holds several values.
    """
    found = _parse(override)
    if found is None or found.is_sweep_override() or found.is_delete():
        raise UserError(f"{override}: must be key=value, with one value")
    return found.key_or_group, _content(found.value())


def readable(override: str) -> tuple[str, str]:
    """Return key and value of an override in Hydra's grammar; the value is text for a table."""
    key, text = key_and_value(override)
    found = _parse(override)
    if found is None or found.is_sweep_override() or not isinstance(found.value(), str):
        return key, text
    return key, _content(found.value())
