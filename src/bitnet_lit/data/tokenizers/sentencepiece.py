"""This module opens SentencePiece models: llama2.c's, Llama 2's and those that `prepare` trains.

Two facts about SentencePiece shape the code here. First, it writes a space as U+2581 in front of the word that follows,
and puts one in front of the first word of each text (the "dummy prefix"), which decoding takes away again. Second, a
character that no piece covers becomes byte tokens, <0x00> to <0xFF>, so that a token may hold a part of a character.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from bitnet_lit.data.tokenizers.tokenizer import (
    MAX_FILE_BYTES,
    SPACE,
    Piece,
    PieceKind,
    SentencePieceVocabulary,
    StreamDecoder,
    TextEncoder,
    Tokenizer,
    without_surrogates,
)
from bitnet_lit.errors import UserError
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.files.regular_file import read_regular

# SentencePiece decodes a run of byte tokens to one U+FFFD for each byte that is not UTF-8. Python's "replace" gives one
# for each malformed sequence.
codecs.register_error("one_per_byte", lambda error: ("\N{REPLACEMENT CHARACTER}", error.start + 1))  # type: ignore[attr-defined]

NORMALIZED_BY_NFKC = "\N{LATIN SMALL LIGATURE FI}\N{FULLWIDTH LATIN CAPITAL LETTER A}"  # to "fi" and "A"


class SentencePieceTokenizer(Tokenizer):
    """Encodes and decodes with a SentencePiece model.

    Attributes:
        processor: the SentencePieceProcessor.

    Raises:
        UserError: the file is missing, cannot be read, or is not a SentencePiece model with a BOS token.
    """

    file_names = ("tokenizer.model",)
    path: Path

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._content = read_regular(path, "give an existing tokenizer", MAX_FILE_BYTES)
        self.processor = _open(path, self._content)
        self.sha256 = hashlib.sha256(self._content).hexdigest()
        self.vocab_size = self.processor.vocab_size()
        self.bos_id = self.processor.bos_id()
        self.eos_id = self.processor.eos_id()
        if self.bos_id < 0:
            raise UserError(f"tokenizer {path}: has no BOS token, which separates the stories: train it with one")

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Return the token ids of a text, with BOS in front unless `bos` is False."""
        ids: list[int] = self.processor.encode(without_surrogates(text))
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        text: str = self.processor.decode(list(map(int, ids)))
        return text

    def piece_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes that a token adds in the middle of a text."""
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
        """Write tokenizer.model into a folder, as it was when it was opened."""
        with atomic_file(folder / self.file_names[0]) as temporary:
            temporary.write_bytes(self._content)

    def stream_decoder(self, prompt_ids: Sequence[int] = ()) -> StreamDecoder:
        """Return a decoder for the tokens that follow `prompt_ids`."""
        return SentencePieceDecoder(self, prompt_ids)

    def shard_encoder(self, dtype: np.dtype) -> TextEncoder:
        """Return what turns a text into its ids without BOS, as the bytes of an array of `dtype`."""
        from bitnet_lit.data.tokenizers.fast_encoder import FastEncoder  # imports protobuf, which only `prepare` needs

        return FastEncoder(self.processor, dtype)

    def sentencepiece_vocabulary(self) -> SentencePieceVocabulary:
        """Return the pieces of the model, for formats that store them in their own way."""
        processor, ids = self.processor, list(range(self.vocab_size))
        pieces = [
            Piece(text, score, self._kind(token))
            for token, text, score in zip(ids, processor.id_to_piece(ids), processor.get_score(ids), strict=True)
        ]
        return SentencePieceVocabulary(
            pieces=pieces,
            # The scores of a BPE are ranks, those of a unigram model are log probabilities.
            is_bpe=all(piece.score.is_integer() for piece in pieces if piece.kind is not PieceKind.BYTE),
            normalizes=processor.normalize(NORMALIZED_BY_NFKC).replace(SPACE, "") != NORMALIZED_BY_NFKC,
            adds_space_prefix=processor.normalize("a") == f"{SPACE}a",
            unk_id=processor.unk_id(),
        )

    def transformers_files(self) -> dict[str, str]:
        """Return a tokenizer.json and its tokenizer_config.json, where they can say what this model does."""
        from bitnet_lit.data.tokenizers.transformers_files import transformers_files  # imports protobuf

        return transformers_files(self.processor, self.sentencepiece_vocabulary())

    def _kind(self, token: int) -> PieceKind:
        processor = self.processor
        kinds = {
            PieceKind.UNKNOWN: processor.is_unknown,
            PieceKind.CONTROL: processor.is_control,
            PieceKind.UNUSED: processor.is_unused,
            PieceKind.BYTE: processor.is_byte,
        }
        return next((kind for kind, is_it in kinds.items() if is_it(token)), PieceKind.NORMAL)


def _open(path: Path | str, content: bytes) -> sentencepiece.SentencePieceProcessor:
    """Return the processor of a model file's content; refuse a file that SentencePiece opens and crashes on later."""
    if content:  # SentencePiece accepts an empty one
        with contextlib.suppress(RuntimeError, ValueError, OSError):
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            size = processor.vocab_size()
            ids = list(range(size))
            pieces = processor.id_to_piece(ids)  # a flipped bit leaves a piece that is no UTF-8: ValueError
            bytes_ = [piece for piece, is_byte in zip(pieces, processor.is_byte(ids), strict=True) if is_byte]
            if size and all(re.fullmatch("<0x[0-9A-F]{2}>", piece) for piece in bytes_):
                return processor
    raise UserError(f"tokenizer {path}: not a SentencePiece model ({len(content)} bytes): give another file")


class SentencePieceDecoder:
    """Decodes a stream to exactly what SentencePiece gives for the whole text, in constant time for each token.

    The texts that `feed` and `flush` return, joined, are what decoding prompt and continuation together adds to the
    decoded prompt.

    Args:
        prompt_ids: the tokens that stand before the stream. They decide whether the first space of the stream is the
            dummy prefix.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer, self._processor = tokenizer, tokenizer.processor
        self._pending = b""  # the beginning of a character
        # Decoding undoes what the model does to spaces: it takes away the dummy prefix, or all spaces at the start.
        normalized = self._processor.normalize("  a")
        self._drops_all_spaces = not normalized.startswith(SPACE * 2)
        self._at_start = normalized != "  a".replace(" ", SPACE)  # no text yet: a space here is the dummy prefix
        for token in prompt_ids:
            if not self._at_start:
                break  # nothing else of the prompt matters
            self.feed(int(token))
        self._at_start = self._at_start and not self._pending
        self._pending = b""  # decoding the prompt has given U+FFFD for it already

    def feed(self, token: int) -> str:
        """Return the text that became final with this token; empty while a character is incomplete."""
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
        """Return what is left of an incomplete character at the end: one U+FFFD for each of its bytes."""
        text = "\N{REPLACEMENT CHARACTER}" * len(self._pending)
        self._pending = b""
        return text


def _incomplete_suffix(data: bytes) -> int:
    """Return how many bytes at the end of `data` begin a UTF-8 character that more bytes could complete."""
    for length in range(1, min(3, len(data)) + 1):
        byte = data[-length]
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return length if length < needed else 0
        if byte < 0x80:
            return 0
    return 0
