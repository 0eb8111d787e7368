"""SentencePiece tokenizers: the ones llama2.c uses and the ones it trains.

Two facts about them shape the code here. A space is written as U+2581 in front of the word that follows, and one is
put before the first word of every text (the "dummy prefix"), which decoding takes away again. And a character that
no piece covers falls apart into byte tokens `<0x00>`..`<0xFF>`, so that a token may hold a part of a character.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from bitnet_lit.atomic import atomic_file
from bitnet_lit.errors import UserError
from bitnet_lit.regular_file import read_regular

if TYPE_CHECKING:
    from bitnet_lit.data.json_tokenizer import JsonStreamDecoder

# SentencePiece decodes a run of byte tokens to one U+FFFD per byte that is no UTF-8; Python's "replace" would give one
# per malformed sequence.
codecs.register_error("one_per_byte", lambda error: ("\N{REPLACEMENT CHARACTER}", error.start + 1))  # type: ignore[attr-defined]

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # U+2581, SentencePiece's space
MAX_SENTENCE_BYTES = 4192  # SentencePiece's default max_sentence_length, with which llama2.c trains
BYTE_AND_CONTROL_TOKENS = 256 + 3  # <unk>, <s>, </s>
MAX_FILE_BYTES = 2**26  # of a tokenizer's file; those of 260,000 entries have 35 MB


class Tokenizer:
    """An opened SentencePiece model.

    Attributes:
        path: the file.
        processor: SentencePiece's own object.
        vocab_size, bos_id, eos_id: ints.
        sha256: of the file, in hex.

    Raises:
        UserError: missing, unreadable, or no SentencePiece model.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._content = read_regular(path, "give an existing tokenizer", MAX_FILE_BYTES)
        self.processor = _open(path, self._content)
        self.sha256 = hashlib.sha256(self._content).hexdigest()
        self.vocab_size: int = self.processor.vocab_size()
        self.bos_id: int = self.processor.bos_id()
        self.eos_id: int = self.processor.eos_id()
        if self.bos_id < 0:
            raise UserError(f"tokenizer {path}: has no BOS token, which separates the stories: train it with one")

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text, BOS first unless told otherwise; half a character pair counts as U+FFFD."""
        ids: list[int] = self.processor.encode(without_surrogates(text))
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens are silent, broken UTF-8 becomes U+FFFD."""
        text: str = self.processor.decode(list(map(int, ids)))
        return text

    def piece_bytes(self, token: int) -> bytes:
        """What a token adds to the middle of a text: UTF-8, a lone byte of it, or nothing for a control token."""
        processor = self.processor
        if processor.is_control(token):
            return b""
        piece: str = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0xNN>
        if processor.is_unknown(token):
            return processor.decode([token]).encode()
        return piece.replace(SPACE, " ").encode()

    def copy_to(self, folder: Path) -> None:
        """Put the tokenizer into a folder, as it was when it was opened: its file may be gone or changed since."""
        with atomic_file(folder / "tokenizer.model") as temporary:
            temporary.write_bytes(self._content)

    def stream_decoder(self, prompt_ids: Sequence[int] = ()) -> StreamDecoder | JsonStreamDecoder:
        """A decoder of the text that goes on from `prompt_ids`."""
        return StreamDecoder(self, prompt_ids)

    def text_bytes(self, inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> int:
        """UTF-8 bytes of text that predicted tokens stand for.

        The space that a text's first piece starts with is the dummy prefix, no text: it counts nothing.

        Args:
            inputs: int64, any shape: the token before each target.
            targets: int64, same shape.
        """
        lengths, spaced = self._tables()
        return int(lengths[targets].sum() - (spaced[targets] & (inputs == self.bos_id)).sum())

    def _tables(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        if not hasattr(self, "_lengths"):
            pieces = [self.piece_bytes(token) for token in range(self.vocab_size)]
            self._spaced = np.array([piece.startswith(b" ") for piece in pieces])
            self._lengths = np.array(
                [len(piece) for piece in pieces], dtype=np.int64
            )  # last: other threads look for it
        return self._lengths, self._spaced


def _open(path: Path | str, content: bytes) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece's own object of a model file's content, or the user hears of it."""
    if content:  # an empty one is accepted, and crashes later
        with contextlib.suppress(RuntimeError, ValueError, OSError):
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            size = processor.vocab_size()
            ids = list(range(size))
            pieces = processor.id_to_piece(ids)  # a flipped bit leaves a piece that is no UTF-8: ValueError
            bytes_ = [piece for piece, is_byte in zip(pieces, processor.is_byte(ids), strict=True) if is_byte]
            if size and all(re.fullmatch("<0x[0-9A-F]{2}>", piece) for piece in bytes_):
                return processor
    raise UserError(f"tokenizer {path}: not a SentencePiece model ({len(content)} bytes): give another file")


def without_surrogates(text: str) -> str:
    """Half of a character pair, which JSON can escape and no encoding can hold, becomes U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class StreamDecoder:
    """Text from tokens as they come, never a broken character; constant time for each.

    After feeding the ids of a continuation, the pieces joined (with `flush`) are what decoding prompt and
    continuation together adds to the decoded prompt.

    Args:
        prompt_ids: what stands before; decides whether the first piece's space is the dummy prefix.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer, self._processor = tokenizer, tokenizer.processor
        self._pending = b""  # the beginning of a character
        # What the model does to spaces says what decoding undoes: the dummy prefix, or all spaces at the start.
        normalized = self._processor.normalize("  a")
        self._drops_all_spaces = not normalized.startswith(SPACE * 2)
        self._at_start = normalized != "  a".replace(" ", SPACE)  # no text yet, so that a space is not one
        for token in prompt_ids:
            if not self._at_start:
                break  # nothing else of the prompt matters
            self.feed(int(token))
        self._at_start = self._at_start and not self._pending
        self._pending = b""  # decoding the prompt alone has given its U+FFFD already

    def feed(self, token: int) -> str:
        """The text that became final with this token; empty while a character is incomplete."""
        piece = self._tokenizer.piece_bytes(token)
        if self._processor.is_byte(token):
            self._pending += piece
            complete = len(self._pending) - _incomplete_suffix(self._pending)
            text = self._pending[:complete].decode("utf-8", errors="one_per_byte")
            self._pending = self._pending[complete:]
        else:  # ends a run of bytes, even a control token
            text = self.flush()
            self._at_start = self._at_start and not text
            if self._at_start and piece[:1] == b" " and not self._processor.is_unknown(token):
                piece = piece[1:]
                self._at_start = self._drops_all_spaces
            text += piece.decode("utf-8")
        self._at_start = self._at_start and not text
        return text

    def flush(self) -> str:
        """What is left of an incomplete character at the end: a U+FFFD for each of its bytes."""
        text = "\N{REPLACEMENT CHARACTER}" * len(self._pending)
        self._pending = b""
        return text


def _incomplete_suffix(data: bytes) -> int:
    """Length of the beginning of a UTF-8 character that `data` ends with and that more bytes could complete."""
    for length in range(1, min(3, len(data)) + 1):
        byte = data[-length]
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return length if length < needed else 0
        if byte < 0x80:
            return 0
    return 0


def _training_sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines that are not blank, in parts that SentencePiece takes: it leaves out longer ones without a word."""
    for text in texts:
        for line in text.split("\n"):
            start, bytes_left = 0, len(line.encode())
            while bytes_left > MAX_SENTENCE_BYTES:
                limit = start + MAX_SENTENCE_BYTES // 4  # a character takes 4 bytes at most
                cut = line.rfind(" ", start + 1, limit)
                part = line[start : cut if cut > 0 else limit]
                yield part
                start += len(part)
                bytes_left -= len(part.encode())
            if (rest := line[start:]).strip():
                yield rest


def _noting_failures(sentences: Iterable[str], failures: list[BaseException]) -> Iterator[str]:
    try:
        yield from sentences
    except BaseException as error:
        failures.append(error)
        raise


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Train a BPE model with llama2.c's options (`tinystories.py train_vocab`) and write it to `path`.

    Args:
        texts: documents; each line is a training sentence, as in llama2.c's text file. Longer ones than
            SentencePiece takes are cut.
        vocab_size: entries, 256 byte tokens and 3 control tokens included.

    Raises:
        UserError: no text, or a text that does not support that many entries or needs more; with the size.
    """
    lines = iter(_training_sentences(texts))
    first = next(lines, None)
    if first is None:
        raise UserError("no text to train a tokenizer on: give a source that holds some, or an existing tokenizer=")
    failures: list[BaseException] = []
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_noting_failures(itertools.chain([first], lines), failures),
                model_writer=file,
                model_type="bpe",
                vocab_size=vocab_size,
                self_test_sample_size=0,
                character_coverage=1.0,
                num_threads=os.cpu_count() or 1,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                unk_surface=r" \342\201\207 ",
                normalization_rule_name="identity",
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            if failures:  # the library wraps it into one of its own, with a traceback in it
                raise failures[0] from None
            message = str(error)
            limit = re.search(r"value <= (\d+)", message)
            least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
            if limit:
                raise UserError(
                    f"vocab_size={vocab_size} is too large for this text: it supports at most {limit.group(1)}"
                ) from None
            if least:
                raise UserError(
                    f"vocab_size={vocab_size} is too small for this text: bytes, control tokens and its characters "
                    f"take {least.group(1)}"
                ) from None
            if vocab_size < BYTE_AND_CONTROL_TOKENS:
                raise UserError(
                    f"vocab_size={vocab_size} is too small: bytes and control tokens alone take "
                    f"{BYTE_AND_CONTROL_TOKENS}"
                ) from None
            raise UserError(f"vocab_size={vocab_size}: SentencePiece says {' '.join(message.split())}") from None
    return Tokenizer(path)
