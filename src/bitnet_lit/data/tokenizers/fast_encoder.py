"""`FastEncoder` encodes word by word: it gives SentencePiece's ids at several times its speed.

A BPE piece holds a space at its front only, so no merge joins a character with a space that follows it. A text can
therefore be cut in front of each run of spaces. Merges inside such a unit do not depend on what stands around it, so
the ids of the text are the ids of its units, one after the other. Text repeats its words: each unit is encoded once,
and looked up from then on. A line break that no piece joins to another character is a place to cut, too. Much text is
looked up in C++ (native_units.py), at three times the speed of the loop here.

This holds for models with an identity normalizer, byte fallback and no piece with an inner space. llama2.c's models and
Llama 2's are such models. `FastEncoder` checks, and encodes whole texts where it does not hold.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence

import numpy as np
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from bitnet_lit.data.tokenizers.native_units import NativeUnits
from bitnet_lit.data.tokenizers.tokenizer import SPACE, TextEncoder
from bitnet_lit.native.build import NoCompilerError

MAX_CACHED_UNITS = 1_000_000  # about 150 MB; natural text rarely has more distinct words than that
# A longer unit (a web address, a sentence in a script without spaces) hardly comes twice, and would fill the memory.
MAX_CACHED_CHARACTERS = 64
# A text of many millions of characters (a book, a file without separators) is encoded in parts of about this size: its
# words, each a Python object, would take twenty times its memory.
CHARACTERS_AT_ONCE = 2**20
NATIVE_FROM_CHARACTERS = 2**24  # so much text takes half a second in Python; compiling takes one
GLUED = "\0"  # marks a unit that follows the one before without a space; a text that holds a NUL is encoded whole
_PART_BORDER = re.compile(rf"[^\s{SPACE}] [^\s{SPACE}]")
BPE = 2  # TrainerSpec.ModelType in sentencepiece_model.proto
CONTROL, USER_DEFINED, UNKNOWN, BYTE = 3, 4, 2, 6  # SentencePiece.Type there


class _UnitCache(dict[str, bytes]):
    """Holds the bytes of the ids of each unit; a unit that is not there yet is encoded when it is looked up.

    Args:
        num_prefix_ids: the number of ids of the dummy prefix in front of a line break.
    """

    def __init__(self, processor: SentencePieceProcessor, dtype: np.dtype, num_prefix_ids: int) -> None:
        super().__init__()
        self._encode, self._dtype, self._num_prefix_ids = processor.encode, dtype, num_prefix_ids

    def encode_unit(self, unit: str, is_glued: bool) -> tuple[bytes, bool]:
        """Return the bytes of the ids of a unit, and whether it is short enough to be kept."""
        ids = self._encode(unit)
        # The dummy prefix is the one space that cutting took away; a glued unit has none.
        encoded = np.array(ids[self._num_prefix_ids :] if is_glued else ids, dtype=self._dtype).tobytes()
        return encoded, len(unit) <= MAX_CACHED_CHARACTERS

    def __missing__(self, unit: str) -> bytes:
        is_glued = unit[0] == GLUED
        encoded, is_kept = self.encode_unit(unit[is_glued:], is_glued)
        if is_kept:
            self[unit] = encoded
        return encoded


class FastEncoder(TextEncoder):
    """Encodes many texts with one SentencePiece model.

    Args:
        native_from: characters from which on units are looked up in C++; None: never.

    Attributes:
        by_words: whether the model allows encoding by words; every text is encoded whole otherwise.
    """

    def __init__(
        self, processor: SentencePieceProcessor, dtype: np.dtype, native_from: int | None = NATIVE_FROM_CHARACTERS
    ) -> None:
        super().__init__(self.encode)
        self._native_from = native_from
        self._dtype, self._encode = dtype, processor.encode
        one_break, two_breaks = len(self._encode("\n")), len(self._encode("\n\n"))
        self._cache = _UnitCache(processor, dtype, num_prefix_ids=2 * one_break - two_breaks)
        model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
        model.ParseFromString(processor.serialized_model_proto())
        normalizer = model.normalizer_spec
        # A piece with a space behind something else would be cut apart. Control and byte pieces never match text.
        texts = [piece.piece for piece in model.pieces if piece.type not in (UNKNOWN, CONTROL, BYTE)]
        inner_space = any(re.search(f"[^{SPACE}]{SPACE}", text) for text in texts)
        self._cuts_lines = not any("\n" in text and text != "\n" for text in texts)
        user_defined = any(piece.type == USER_DEFINED for piece in model.pieces)
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
        self._characters = 0  # that were encoded so far
        self._native: NativeUnits | None = None

    def use_native(self) -> bool:
        """Go on in C++ where it can be compiled, with the units that are known; return whether it can."""
        with contextlib.suppress(NoCompilerError):
            self._native = NativeUnits(
                self._cache.encode_unit, self._dtype.itemsize, self._collapses_spaces, MAX_CACHED_UNITS
            )
            for unit, ids in self._cache.items():
                is_glued = unit[0] == GLUED
                self._native.add(unit[is_glued:].encode(), is_glued, ids)
            self._cache.clear()
        return self._native is not None

    def encode(self, text: str) -> bytes:
        """Return the token ids of a text without BOS, as the bytes of an array of the encoder's dtype."""
        if not self.by_words or len(text) <= CHARACTERS_AT_ONCE:
            return self._encode_part(text)
        parts, start = [], 0
        while border := _PART_BORDER.search(text, start + CHARACTERS_AT_ONCE):
            parts.append(self._encode_part(text[start : border.start() + 1]))
            start = border.end() - 1  # the one space between them is the dummy prefix of the next part
        return b"".join([*parts, self._encode_part(text[start:])])

    def many(self, texts: Sequence[str], bos: bytes) -> bytes:
        """Return the bytes of the ids of several texts, each behind `bos`; short ones in one call of C++.

        Texts that are cut in another way than most (see `_encode_part`) are encoded by themselves.
        """
        if self._native is None or not self.by_words or not self._cuts_lines:
            return b"".join([bos + self.encode(text) for text in texts])
        parts: list[bytes] = []
        together: list[bytes] = []

        def write() -> None:
            if together:
                assert self._native is not None
                parts.append(bos + self._native.encode(b"\0".join(together), True, bos))
                together.clear()

        for text in texts:
            content = text.encode()  # which is searched faster than text
            if (
                len(content) > CHARACTERS_AT_ONCE
                or b" \n" in content
                or b"\0" in content
                or SPACE in text
                or content[:1] in (b"", b" ", b"\n")
                or content[-1:] == b" "
            ):
                write()
                parts.append(bos + self.encode(text))
            else:
                together.append(content)
        write()
        return b"".join(parts)

    def _encode_part(self, text: str) -> bytes:
        # The model reads a literal U+2581 as a space, and split() does not; spaces at an end belong to no unit.
        if not self.by_words or SPACE in text or GLUED in text or text[:1] == " " or text[-1:] == " ":
            return np.array(self._encode(text), dtype=self._dtype).tobytes()
        cuts_lines = self._cuts_lines and "\n" in text and " \n" not in text and text[0] != "\n"
        before, self._characters = self._characters, self._characters + len(text)
        if self._native_from is not None and before < self._native_from <= self._characters:
            self.use_native()
        if self._native is not None:
            return self._native.encode(text.encode(), cuts_lines)
        if len(self._cache) > MAX_CACHED_UNITS:
            self._cache.clear()
        if cuts_lines:
            text = text.replace("\n", f" {GLUED}\n")
        units = text.split(" ")
        if "" in units:  # runs of spaces
            units = [unit for unit in units if unit] if self._collapses_spaces else _join_runs(units)
        return b"".join(map(self._cache.__getitem__, units))


def _join_runs(units: list[str]) -> list[str]:
    """Turn ["a", "", "b"] into ["a", " b"]: an empty unit is one more space of a run, in front of the next unit."""
    joined, spaces = [], 0
    for unit in units:
        if unit:
            joined.append(" " * spaces + unit)
            spaces = 0
        else:
            spaces += 1
    return joined
