"""`Tokenizer` is the interface: what training, generation and exports ask of a tokenizer.

Two kinds come with the project, one file each: `sentencepiece.py` opens SentencePiece models (llama2.c's, Llama 2's and
those that `prepare` trains), `tokenizer_json.py` opens Hugging Face's tokenizer.json. Code outside this package sees
`Tokenizer` alone. A tokenizer of your own is a subclass with three numbers and three methods. One token for each byte,
for example:

    class ByteTokenizer(Tokenizer):
        vocab_size, bos_id, eos_id = 257, 256, 256

        def encode(self, text, bos=True):
            return [self.bos_id] * bos + list(text.encode())

        def decode(self, ids):
            return bytes(id for id in ids if id < 256).decode(errors="replace")

        def piece_bytes(self, token):
            return bytes([token]) if token < 256 else b""

A token stands for bytes, not for characters: it may hold a part of a character, and only decoding several tokens
together gives text.
"""

from __future__ import annotations

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # U+2581, which SentencePiece writes for a space
MAX_FILE_BYTES = 2**26  # of a tokenizer's file; those of 260,000 entries have 35 MB


class Tokenizer(ABC):
    """A tokenizer turns text into token ids and back.

    Attributes:
        vocab_size: all ids are below this number.
        bos_id: the id that stands in front of each text, and so separates documents.
        eos_id: the id that ends a text; -1 where there is none.
        path: the file that it was read from; None for a tokenizer that has none.
        sha256: identifies the tokenizer, in hex. The hash of its file, or else of all its pieces.
        file_names: the files that `copy_to` writes; the first one is the one to open.
    """

    file_names: ClassVar[tuple[str, ...]] = ()
    vocab_size: int
    bos_id: int
    eos_id: int
    path: Path | None = None

    def __str__(self) -> str:
        """Name the tokenizer in an error's line: its file, or else its class."""
        return str(self.path or type(self).__name__)

    @property
    def end_ids(self) -> list[int]:
        """The ids that end a text: EOS where there is one, and BOS, which alone separates the stories in shards."""
        return [token for token in dict.fromkeys((self.eos_id, self.bos_id)) if token >= 0]

    @abstractmethod
    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Return the token ids of a text, with BOS in front unless `bos` is False."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. Control tokens have no text; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def piece_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes that a token adds in the middle of a text; none for a control token."""

    def copy_to(self, folder: Path) -> None:  # noqa: B027  # optional: a class of one's own may have no file
        """Write the tokenizer's files into a folder, as they were when it was opened. The default writes nothing."""

    def stream_decoder(self, prompt_ids: Sequence[int] = ()) -> StreamDecoder:
        """Return a decoder for the tokens that follow `prompt_ids`."""
        return PieceDecoder(self, prompt_ids)

    def shard_encoder(self, dtype: np.dtype) -> TextEncoder:
        """Return what turns a text into its ids without BOS, as the bytes of an array of `dtype`."""
        return TextEncoder(lambda text: np.array(self.encode(text, bos=False), dtype=dtype).tobytes())

    def transformers_files(self) -> dict[str, str]:
        """Return the contents of files, by name, that `transformers` needs beside those of `copy_to`; often none."""
        return {}

    def sentencepiece_vocabulary(self) -> SentencePieceVocabulary | None:
        """Return the pieces of a SentencePiece model, which some export formats store; None for another kind."""
        return None

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for token in range(self.vocab_size):
            piece = self.piece_bytes(token)
            digest.update(len(piece).to_bytes(4, "little") + piece)
        return digest.hexdigest()

    def text_bytes(self, inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> int:
        """Return how many UTF-8 bytes of text the target tokens stand for: the denominator of bits per byte.

        A space at the start of a document counts nothing. SentencePiece puts one there that is not part of the text.

        Args:
            inputs: int64, any shape: the token before each target.
            targets: int64, same shape.
        """
        lengths, begins_with_space = self._piece_tables
        return int(lengths[targets].sum() - (begins_with_space[targets] & (inputs == self.bos_id)).sum())

    @cached_property
    def _piece_tables(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The length in bytes of each piece, int64 (V,), and whether it begins with a space, bool (V,)."""
        pieces = [self.piece_bytes(token) for token in range(self.vocab_size)]
        lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        return lengths, np.array([piece.startswith(b" ") for piece in pieces])


class TextEncoder:
    """Encodes many texts, for shards.

    Args:
        encode_text: returns the bytes of the ids of a text, without BOS.
    """

    def __init__(self, encode_text: Callable[[str], bytes]) -> None:
        self._encode_text = encode_text

    def __call__(self, text: str) -> bytes:
        """Return the bytes of the ids of a text, without BOS."""
        return self._encode_text(text)

    def many(self, texts: Sequence[str], bos: bytes) -> bytes:
        """Return the bytes of the ids of several texts, each behind `bos`."""
        return b"".join([bos + self._encode_text(text) for text in texts])


class StreamDecoder(Protocol):
    """Turns tokens into text as they come, and never returns a part of a character."""

    def feed(self, token: int) -> str:
        """Return the text that became final with this token; empty while a character is incomplete."""

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for an incomplete character."""


class PieceDecoder:
    """Decodes a stream of any tokenizer: the bytes of its pieces are decoded as UTF-8.

    Args:
        prompt_ids: the tokens that stand before the stream. Their text decides whether the first piece of the stream
            begins a text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = not any(tokenizer.piece_bytes(int(token)) for token in prompt_ids)

    def feed(self, token: int) -> str:
        """Return the text that became final with this token."""
        piece = self._tokenizer.piece_bytes(token)
        if self._at_start and piece:
            self._at_start = False
            if b" " in piece and _is_utf8(piece):  # decoding takes away a space that encoding put in front of the text
                piece = self._tokenizer.decode([token]).encode()
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """Return what is left of an incomplete character at the end."""
        return self._utf8.decode(b"", final=True)


def _is_utf8(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def without_surrogates(text: str) -> str:
    """Return a text with U+FFFD for each half of a surrogate pair: JSON can escape one, and UTF-8 cannot hold it."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class PieceKind(Enum):
    """A PieceKind says what SentencePiece uses a piece for."""

    NORMAL = "normal"  # text
    UNKNOWN = "unknown"  # stands for text that no piece covers
    CONTROL = "control"  # <s>, </s>: no text
    UNUSED = "unused"
    BYTE = "byte"  # <0x00> to <0xFF>: a byte of a character that no piece covers


@dataclass(frozen=True)
class Piece:
    """A Piece is one entry of a SentencePiece vocabulary.

    Attributes:
        text: with U+2581 for a space.
        score: BPE merges the pair of neighbours whose joined piece has the largest score.
    """

    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True)
class SentencePieceVocabulary:
    """This vocabulary is what GGUF and llama2.c's tokenizer.bin store of a SentencePiece model, each in its own way.

    Attributes:
        pieces: by id.
        is_bpe: whether its pieces are merged by score. A unigram model chooses them by probability instead.
        normalizes: whether it changes the text before it is cut into pieces, as NFKC does.
        adds_space_prefix: whether it puts a space in front of each text.
        unk_id: the id of the unknown token; -1 where there is none.
    """

    pieces: list[Piece]
    is_bpe: bool
    normalizes: bool
    adds_space_prefix: bool
    unk_id: int
