"""A data set of the Hugging Face hub comes in splits. Those held out are not trained on, and a loss is of one of them.

Names say which split a file belongs to:

    train-00000-of-00002.parquet      a clone of a repository; also validation.jsonl, test.txt
    test/a.jsonl, test/en/a.jsonl     the same, with a folder for another split, such as train/, beside test/
    test/data-00000-of-00001.arrow    a folder of `DatasetDict.save_to_disk`, with dataset_dict.json beside test/

The hub has several words for a split, and so has this module:
https://huggingface.co/docs/hub/datasets-file-names-and-splits. A split of any other name is for training.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitnet_lit.errors import UserError

_TRAINING = ("train", "training")
_VALIDATION = ("validation", "valid", "val", "dev")
_TEST = ("test", "testing", "eval", "evaluation")
_PART = re.compile(r"(?:.*-)?(\w+)-\d{5}-of-\d{5}(-.*)?")
_DICT_NAME = "dataset_dict.json"


@dataclass(frozen=True)
class Splits:
    """Holds the files of a source by their use, each list in the order of the source.

    Attributes:
        training: files to train on.
        validation: files of the split that becomes the validation shard; none where the source has no such split.
        left_out: files that are not read: those of the test split, where there is a validation split as well.
        names: the name of each file's split; an empty text where it has none.
    """

    training: list[Path]
    validation: list[Path]
    left_out: list[Path]
    names: dict[Path, str]


def divide(files: Sequence[Path]) -> Splits:
    """Divide files by the splits that their names say.

    The test split is the validation split of a data set that has no other. Where no name says that a file is for
    training, the user has chosen the files (`source=<folder>/test`), and all of them are for training.
    """
    names = split_names(files)
    uses = {path: _use(name) for path, name in names.items()}
    validation = [path for path in files if uses[path] is _VALIDATION]
    test = [path for path in files if uses[path] is _TEST]
    training = [path for path in files if uses[path] is _TRAINING]
    if not any(names[path] for path in training):
        return Splits(list(files), [], [], names)
    return Splits(training, validation, test, names) if validation else Splits(training, test, [], names)


def split_names(files: Sequence[Path]) -> dict[Path, str]:
    """Return the name of each file's split, such as train or test_sft; an empty text where no name says one."""
    of_splits = {folder for path in files for folder in path.parents if _is_word(folder.name)}
    beside = Counter(folder.parent for folder in of_splits)
    of_splits = {folder for folder in of_splits if beside[folder.parent] > 1}
    names = {path: _own_split(path) for path in files}
    for path, own in names.items():
        folder = next((folder for folder in path.parents if folder in of_splits), None)
        if folder is not None and not _is_word(own.split("_")[0]):
            names[path] = folder.name
    return names


def _own_split(path: Path) -> str:
    """Return the name of the split that a file's own name says, or the folder of a saved `DatasetDict`."""
    if (path.parent.parent / _DICT_NAME).is_file():
        return path.parent.name
    name = path.name.split(".")[0]
    if part := _PART.fullmatch(name):
        return part[1]
    return name if _is_word(name) else ""


def _is_word(name: str) -> bool:
    return name.lower() in (*_TRAINING, *_VALIDATION, *_TEST)


def _use(split: str) -> tuple[str, ...]:
    """Return the words for the use of a split: its first word says it (test_sft is a test split)."""
    word = split.lower().split("_")[0]
    return next((words for words in (_VALIDATION, _TEST) if word in words), _TRAINING)


def check_one_use(files: Sequence[Path], typed: str) -> None:
    """Refuse files of splits that have different uses: a loss over training and test text together says nothing.

    Args:
        files: what `typed` means.
        typed: key=value as the user gave it.

    Raises:
        UserError: the files belong to several splits; the line says how to give one.
    """
    splits: dict[str, list[Path]] = {}
    for path, name in split_names(files).items():
        if name:
            splits.setdefault(name, []).append(path)
    if len({_use(name) for name in splits}) > 1:
        held_out = [name for name in splits if _use(name) is not _TRAINING]
        raise UserError(
            f"{typed}: holds the splits {', '.join(splits)}: give one of them, such as "
            f"{typed.partition('=')[0]}={shlex.quote(_place(splits[held_out[0]], files))}"
        )


def _place(split: Sequence[Path], files: Sequence[Path]) -> str:
    """Return a folder, a file or a glob that means files of one split, and no others of `files`."""
    folder = os.path.commonpath([path.parent for path in split])
    if not any(path.is_relative_to(folder) for path in files if path not in split):
        return folder
    return str(split[0]) if len(split) == 1 else re.sub(r"\d{5}-of-\d{5}.*", "*", str(split[0]))
