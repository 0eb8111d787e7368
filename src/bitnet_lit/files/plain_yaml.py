"""YAML is read and written here as plain data: dictionaries, lists, text, numbers.

A run's config.yaml may come from somebody else. OmegaConf would replace `${oc.env:SECRET}` in it by the value of that
variable. YAML's tags can build objects, and its aliases can repeat a value a million times. Here texts are not
interpreted, and tags and aliases are refused. A value that is written here is read back as the same value, whatever
characters it holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bitnet_lit.errors import UserError, one_line
from bitnet_lit.files.regular_file import read_regular

MAX_BYTES = 2**17  # a config with all defaults has 3,000; PyYAML reads about 10,000 a second


class _PlainLoader(yaml.SafeLoader):
    """Loads plain data as `SafeLoader` does, but refuses aliases and tags."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        if self.peek_event().tag is not None:
            raise yaml.YAMLError("tags (!name) are not allowed")
        return super().compose_node(parent, index)


class _PlainDumper(yaml.SafeDumper):
    """Writes plain data as `SafeDumper` does, but without aliases, and with the quotes of `_text`."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Write a text so that it is read back as the same text.

    Quotes keep YAML 1.2 and OmegaConf from reading a number (1e3) or a reference (${...}). Unicode's line ends are
    escaped, because YAML would read them as spaces.
    """
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
    """Return `value` as YAML, with the keys in their order."""
    return yaml.dump(value, Dumper=_PlainDumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def read_yaml(path: Path, remedy: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping with text keys.

    Args:
        remedy: the end of an error message: what the user can do.

    Raises:
        UserError: the file cannot be read, or does not hold such a mapping.
    """
    content = read_regular(path, remedy, MAX_BYTES)
    try:
        value = yaml.load(content.decode("utf-8-sig"), _PlainLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(error, 200)}): {remedy}") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{path}: damaged (it holds no keys and values): {remedy}")
    return value
