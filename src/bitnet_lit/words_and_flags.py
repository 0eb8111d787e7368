"""Words and flags on a command line are answered with the key=value that they mean: every option is typed so."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from bitnet_lit.did_you_mean import composed, known_keys, nearest_key, shown
from bitnet_lit.other_names import FLAGS, KEYS, SPELLINGS, WORDS
from bitnet_lit.runs.folder import is_run

_OVERRIDE_START = re.compile(r"[\w+~.]+=")
# What a word without a key most likely is: a text or files, or else a folder that is there.
_LONE_TEXT = {"infer": "prompt", "prepare": "source", "evaluate": "data", "report": "runs", "plot": "runs"}
_LONE_FOLDER = {"train": "data.dir", "infer": "checkpoint", "evaluate": "checkpoint", "export": "checkpoint"}


def _meant(command: str, name: str, known: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the key that a name without key=value means, or else words of `other_names` on what to type instead."""
    key = KEYS.get(command, {}).get(name) or (name if name in known else None)
    if key is None and (words := FLAGS[command].get(name) or WORDS.get(command, {}).get(name)):
        return None, words
    if key is None and len(name) > 1:
        key = nearest_key(name, known, least=0.85)
    return key, None


def key_for_words(command: str, overrides: Sequence[str], arguments: Sequence[str], conf_dir: Path) -> str | None:
    """Return the error line for words without a key at the start of a command, with the key that they need, or None.

    Words behind a key=value are another mistake: most likely a part of that value, which needs quotes.

    Args:
        overrides: what is no flag of the command line.
        arguments: the command line. Hydra has some flags of one letter that mean other things in other tools: -m, -r.
        conf_dir: the folder of the config files, from which the known keys are read.
    """
    words = list(itertools.takewhile(lambda each: each and "=" not in each and each[0] not in "~+-", overrides))
    if not words:
        return None
    place = arguments.index(words[0])
    before = arguments[place - 1] if place else ""
    if before.startswith("-") and (key := KEYS.get(command, {}).get(before.lstrip("-"))):
        return f"a key has no dashes: {shown(key, words[0])}"
    typed, first, behind = " ".join(words), words[0], words[1:]
    text = None if before.startswith("-") else _LONE_TEXT.get(command)
    folder = next((each for each in (typed, first) if os.path.isdir(each)), None)
    key, value, why, more = text, typed, None, ""
    if folder is not None and command in _LONE_FOLDER:
        more = "" if folder == typed else _behind_folder(command, behind, conf_dir)
        typed = typed if more else folder
        value = folder
        key = "resume" if command == "train" and is_run(Path(folder)) else _LONE_FOLDER[command]
    elif text is not None and behind and all(map(os.path.lexists, words)):
        value = f"[{','.join(words)}]"
    elif (text is None or behind) and re.fullmatch(r"[a-zA-Z_][\w.-]*", first):
        known = known_keys(command, conf_dir)
        if text is None or first in known:
            (key, why), typed = _meant(command, first.replace("-", "_"), known), first
            value = " ".join(behind) if key == text else behind[0] if behind else "<value>"
    if key is None and why is None and (group := _group_with(command, first, conf_dir)):
        key, value, typed = group, first, first
    if key is None:
        return None if why is None else f"'{typed}' is no key=value: {why}"
    meant = f"{key}=<value>" if value == "<value>" else shown(key, value)
    return f"'{typed}' is no key=value: did you mean {meant}{more}?"


def _behind_folder(command: str, words: Sequence[str], conf_dir: Path) -> str:
    """Return what the words behind a folder mean, with a space in front: a text, files or an option; or nothing."""
    if command in ("infer", "evaluate"):
        value = f"[{','.join(words)}]" if command == "evaluate" and len(words) > 1 else " ".join(words)
        return f" {shown(_LONE_TEXT[command], value)}"
    group = _group_with(command, words[0], conf_dir) if len(words) == 1 else None
    return "" if group is None else f" {shown(group, words[0])}"


def _group_with(command: str, option: str, conf_dir: Path) -> str | None:
    """Return the only key that has `option` among its names (train b158, export gguf); None for none or several."""
    if command == "export":
        from bitnet_lit.checkpoints.formats.format import formats  # only for an error: it imports every format

        return "format" if option in formats().names else None
    groups = [path.parent.name for path in conf_dir.glob("*/*.yaml") if path.stem == option]
    return groups[0] if command == "train" and len(groups) == 1 else None


_NO_FLAG = re.compile(
    r"unrecognized arguments: (--?[a-zA-Z]\S*)( .*)?|ambiguous option: (--\S+) could match .*"
    r"|argument --\w+/-([ci]): .*"
)


def key_for_flag(command: str, message: str, arguments: Sequence[str], conf_dir: Path) -> str | None:
    """Return what to type in place of a flag that does not exist: a key, or words of `other_names`; or None.

    Args:
        message: the parser's, which names the flag.
        arguments: the command line.
    """
    if (found := _NO_FLAG.fullmatch(message)) is None:
        return None
    typed = next(filter(None, (found[1], found[3], found[4])))
    flag, sign, value = typed.lstrip("-").partition("=")
    name = flag.replace("-", "_")
    if name not in FLAGS[command]:
        name = SPELLINGS.get(name, name)
    if not sign:
        place = next((at for at, each in enumerate(arguments) if each.lstrip("-") == flag), len(arguments))
        value = next(iter(arguments[place + 1 : place + 2]), "")
        if value.startswith("-") or _OVERRIDE_START.match(value):  # the next flag or key
            value = ""
    known = known_keys(command, conf_dir)
    off = name.removeprefix("no_")
    if name != off and off in known:
        return f"a key has no dashes: {off}=false"
    key, words = _meant(command, name, known)
    if key is None:
        return words
    if not value and isinstance(OmegaConf.select(composed(command, conf_dir), key), bool):
        value = "true"
    return f"a key has no dashes: {shown(key, value) if value else f'{key}=<value>'}"
