"""Encoding by words: SentencePiece's ids at several times its speed.

A BPE piece that contains a space has it at its front only, so no merge ever joins a character with a space behind it.
A text can then be cut before every run of spaces, and since merges are chosen by the pieces inside a unit alone, the
ids of the text are the ids of its units, one after the other. Text repeats its words: each unit is encoded once and
looked up from then on. A line break that no piece holds together with something else is such a border too.

This holds for models with an identity normalizer, byte fallback and no piece with an inner space, which is what
llama2.c and Llama 2 use; `FastEncoder` checks, and encodes whole texts where it does not hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from bitnet_lit.data.json_tokenizer import JsonTokenizer
from bitnet_lit.data.tokenizer import SPACE, Tokenizer

MAX_CACHED_UNITS = 1_000_000  # about 150 MB; natural text rarely has more distinct words than that
# A longer unit (a web address, a sentence in a script without spaces) hardly comes twice, and would fill the memory.
MAX_CACHED_CHARACTERS = 64
GLUED = "\0"  # marks a unit that follows the one before without a space; texts with a NUL of their own go another way
# A text of many millions of characters (a book, a file without separators) is encoded in parts of about this size: its
# words, as objects of their own, would take twenty times its memory.
CHARACTERS_AT_ONCE = 2**20
_BORDER = re.compile(rf"[^\s{SPACE}] [^\s{SPACE}]")
BPE = 2  # TrainerSpec.ModelType in sentencepiece_model.proto


class _UnitCache(dict[str, bytes]):
    """Unit to the bytes of its ids; encodes what it has not seen yet.

    Args:
        num_prefix_ids: ids of the dummy prefix in front of a line break.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, num_prefix_ids: int) -> None:
        super().__init__()
        self._encode, self._dtype, self._num_prefix_ids = tokenizer.processor.encode, dtype, num_prefix_ids

    def __missing__(self, unit: str) -> bytes:
        if unit[0] == GLUED:
            ids = self._encode(unit[1:])[self._num_prefix_ids :]
        else:
            ids = self._encode(unit)  # the dummy prefix puts the one space in front that cutting took away
        encoded = np.array(ids, dtype=self._dtype).tobytes()
        if len(unit) <= MAX_CACHED_CHARACTERS:
            self[unit] = encoded
        return encoded


class FastEncoder:
    """`encode` gives the ids of `tokenizer.encode(text, bos=False)`, as the bytes that a shard holds.

    Attributes:
        dtype: of the ids.
        by_words: whether the model allows it; otherwise every text is encoded whole.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self.dtype = dtype
        if isinstance(tokenizer, JsonTokenizer):  # a tokenizer.json: its library has a cache of its own
            self.by_words = False
            self._encode: Callable[[str], list[int]] = partial(tokenizer.encode, bos=False)
            return
        self._encode = tokenizer.processor.encode
        one_break, two_breaks = len(self._encode("\n")), len(self._encode("\n\n"))
        self._cache = _UnitCache(tokenizer, dtype, num_prefix_ids=2 * one_break - two_breaks)
        model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
        model.ParseFromString(tokenizer.processor.serialized_model_proto())
        normalizer = model.normalizer_spec
        # A piece with a space behind something else would be cut apart. Control and byte pieces never match text.
        texts = [piece.piece for piece in model.pieces if piece.type not in (2, 3, 6)]
        inner_space = any(re.search(f"[^{SPACE}]{SPACE}", text) for text in texts)
        self._cuts_lines = not any("\n" in text and text != "\n" for text in texts)
        user_defined = any(piece.type == 4 for piece in model.pieces)
        self.by_words = (
            model.trainer_spec.model_type == BPE
            and model.trainer_spec.byte_fallback
            and not model.trainer_spec.treat_whitespace_as_suffix
            and not normalizer.precompiled_charsmap
            and normalizer.add_dummy_prefix
            and normalizer.escape_whitespaces
            and not inner_space
            and not user_defined
        )
        self._collapses_spaces = normalizer.remove_extra_whitespaces

    def encode(self, text: str) -> bytes:
        """Token ids without BOS, as the bytes of an array of `dtype`."""
        if not self.by_words or len(text) <= CHARACTERS_AT_ONCE:
            return self._encode_part(text)
        parts, start = [], 0
        while border := _BORDER.search(text, start + CHARACTERS_AT_ONCE):
            parts.append(self._encode_part(text[start : border.start() + 1]))
            start = border.end() - 1  # the one space between is the dummy prefix of what follows
        return b"".join([*parts, self._encode_part(text[start:])])

    def _encode_part(self, text: str) -> bytes:
        # A literal U+2581 reads as a space to the model but not to split(); spaces at an end have no unit to stand in.
        if not self.by_words or SPACE in text or GLUED in text or text[:1] == " " or text[-1:] == " ":
            return np.array(self._encode(text), dtype=self.dtype).tobytes()
        if len(self._cache) > MAX_CACHED_UNITS:
            self._cache.clear()
        if self._cuts_lines and "\n" in text and " \n" not in text and text[0] != "\n":
            text = text.replace("\n", f" {GLUED}\n")
        units = text.split(" ")
        if "" in units:  # runs of spaces
            units = [unit for unit in units if unit] if self._collapses_spaces else _join_runs(units)
        return b"".join(map(self._cache.__getitem__, units))


def _join_runs(units: list[str]) -> list[str]:
    """["a", "", "b"] to ["a", " b"]: an empty unit is a further space of a run, in front of the next unit."""
    joined, spaces = [], 0
    for unit in units:
        if unit:
            joined.append(" " * spaces + unit)
            spaces = 0
        else:
            spaces += 1
    return joined
