"""Reading and writing YAML as plain data: dictionaries, lists, text, numbers.

A run's config.yaml may come from somebody else. OmegaConf would replace `${oc.env:SECRET}` in it by the value, and YAML
has tags that build objects and aliases that repeat a value a million times; here text stays the text that it is, and
tags and aliases are refused. What is written here reads back as the same values, whatever characters they hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bitnet_lit.errors import UserError, one_line
from bitnet_lit.regular_file import read_regular

MAX_BYTES = 2**17  # a config with every default filled in has three thousand; PyYAML reads ten thousand a second


class _PlainLoader(yaml.SafeLoader):
    """`SafeLoader` without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)


class _PlainDumper(yaml.SafeDumper):
    """`SafeDumper` that repeats a value instead of naming it, and quotes text that other readers take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text in quotes where YAML 1.2 (and OmegaConf) would read a number, as in 1e3, or a reference, and with escapes
    where YAML would read Unicode's line ends as spaces."""
    if any(sign in text for sign in "\x85\u2028\u2029"):
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
    try:
        float(text)
    except ValueError:
        style = "'" if "$" in text else None
    else:
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_PlainDumper.add_representer(str, _text)


def dump_yaml(value: dict[str, Any]) -> str:
    """`value` as text, keys in their order."""
    return yaml.dump(value, Dumper=_PlainDumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def read_yaml(path: Path, remedy: str) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    content = read_regular(path, remedy, MAX_BYTES)
    try:
        value = yaml.load(content.decode("utf-8-sig"), _PlainLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(error, 200)}): {remedy}") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{path}: damaged (it holds no keys and values): {remedy}")
    return value
