"""This module names the files of a model folder and finds the tokenizer in it.

A folder of `transformers` has the same names. The file names of tokenizers are in data/tokenizers.
"""

from __future__ import annotations

from pathlib import Path

from bitnet_lit.data.tokenizers import Tokenizer, find_tokenizer, open_tokenizer

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"  # lists the files of weights in several files
GENERATION_NAME = "generation_config.json"
NOTE_NAME = "export.json"  # lists what an export wrote
PICKLED_NAME = "pytorch_model.bin"  # older weights of `transformers`; never opened here


def has_model(folder: Path) -> bool:
    """Return whether a folder holds a config and weights."""
    weights = (folder / WEIGHTS_NAME, folder / INDEX_NAME)
    return (folder / CONFIG_NAME).is_file() and any(path.is_file() for path in weights)


def folder_tokenizer(folder: Path) -> Tokenizer | None:
    """Open the tokenizer of a folder; return None where there is none."""
    path = find_tokenizer(folder)
    return None if path is None else open_tokenizer(path)
