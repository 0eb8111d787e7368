"""Reading and writing YAML as plain data: dictionaries, lists, text, numbers.

A run's config.yaml may come from somebody else. OmegaConf would replace `${oc.env:SECRET}` in it by the value, and YAML
has tags that build objects and aliases that repeat a value a million times; here text stays the text that it is, and
tags and aliases are refused. What is written here reads back as the same values, whatever characters they hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bitnet_lit.errors import UserError

MAX_BYTES = 2**20  # a config with every default filled in has three thousand


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
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        value = yaml.load(raw.decode("utf-8-sig"), _PlainLoader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {remedy}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged ({what}): {remedy}") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{path}: damaged (it holds no keys and values): {remedy}")
    return value
