"""`train_tokenizer` trains a SentencePiece model on text, with the options of llama2.c's `tinystories.py train_vocab`.

The model is a BPE. Each digit is a token of its own, a character that no piece covers becomes one token for each of its
UTF-8 bytes, and characters are not normalized (no NFKC): a ligature stays a ligature. Only `unk_surface`
is left at its default: llama2.c's decodes <unk> as the text of an escape sequence.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from bitnet_lit.data.tokenizers.sentencepiece import SentencePieceTokenizer
from bitnet_lit.errors import UserError, one_line
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.interruptible import interruptible

TRAINED_NAME = SentencePieceTokenizer.file_names[0]
MAX_SENTENCE_BYTES = 4192  # SentencePiece's default max_sentence_length, with which llama2.c trains
THREADS = 16  # SentencePiece writes this number into the model's file, so it must not be this machine's
BYTE_AND_CONTROL_TOKENS = 256 + 3  # <unk>, <s>, </s>


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> SentencePieceTokenizer:
    """Train a BPE model, write it to `path` and open it.

    Args:
        texts: documents. Each line is a training sentence, as in llama2.c's text file; longer lines than
            SentencePiece takes are cut.
        vocab_size: number of entries, with the 256 byte tokens and the 3 control tokens.

    Raises:
        UserError: there is no text, or the text does not fit a vocabulary of that size; the line says which size fits.
    """
    lines = iter(_training_sentences(texts))
    first = next(lines, None)
    if first is None:
        raise UserError("no text to train a tokenizer on: give a source that holds some, or an existing tokenizer=")
    failures: list[BaseException] = []
    model = io.BytesIO()
    train = functools.partial(
        sentencepiece.SentencePieceTrainer.train,
        sentence_iterator=_noting_failures(itertools.chain([first], lines), failures),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        self_test_sample_size=0,
        character_coverage=1.0,
        num_threads=THREADS,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    try:
        interruptible(train)
    except (RuntimeError, ValueError) as error:
        if failures:  # SentencePiece wraps an error of `texts` into one of its own, whose message is a traceback
            raise failures[0] from None
        raise _refusal(str(error), vocab_size) from None
    with atomic_file(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def _refusal(message: str, vocab_size: int) -> UserError:
    """Return what to tell the user when SentencePiece refuses to train, from its own message."""
    if most := re.search(r"value <= (\d+)", message):
        return UserError(
            f"vocab_size={vocab_size} is too large for this text: it supports at most {most.group(1)}: give "
            f"vocab_size={most.group(1)}, or more text"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"vocab_size={vocab_size} is too small for this text: bytes, control tokens and its characters take "
            f"{least.group(1)}"
        )
    if vocab_size < BYTE_AND_CONTROL_TOKENS:
        return UserError(
            f"vocab_size={vocab_size} is too small: bytes and control tokens alone take {BYTE_AND_CONTROL_TOKENS}"
        )
    return UserError(f"vocab_size={vocab_size}: SentencePiece says {one_line(message)}")


def _training_sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines that are not blank. A long line is cut: SentencePiece would leave it out without a warning."""
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
    """Yield the sentences, and keep the error that ends them in `failures`."""
    try:
        yield from sentences
    except BaseException as error:
        failures.append(error)
        raise
