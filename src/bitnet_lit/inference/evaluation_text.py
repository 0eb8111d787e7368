"""`evaluate data=my.txt` measures how well a model predicts text, in windows that slide over each document.

A document is what `prepare` makes of the same files (data/sources/): a file of .txt, divided at <|endoftext|>, a record
of .jsonl and .json, or a row of a table, without white space at its ends. It has the tokens that `prepare` writes. BOS
stands in front of it, and every token of the text is predicted once.

A model reads a window of tokens, and the first tokens of a window have little in front of them. So windows overlap, and
of each but the first only the last `stride` tokens count: each token has at least `length - stride` tokens before it,
except at the start of a document. A small stride gives the better figure and takes longer. For a length of 4, a stride
of 2 and the tokens 1 to 7 behind BOS::

    reads       BOS 1 2 3       2 3 4 5       3 4 5 6
    predicts        1 2 3 4         5 6             7

With n the sum of -ln p over all tokens, the figures are those of the lm-evaluation-harness:

    loss             n / tokens               nats
    perplexity       exp(n / tokens)          depends on the tokenizer, as the loss does
    word_perplexity  exp(n / words)           words are divided by white space
    byte_perplexity  exp(n / bytes)           bytes of UTF-8
    bits_per_byte    n / bytes / ln 2         compares models of any tokenizer

Bytes and words are counted in the text itself. (`evaluate` on shards has no text: it adds up the bytes of tokens, and
counts the end of a document as a token to predict.)
"""

from __future__ import annotations

import math
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.config import EngineConfig, EvaluateConfig
from bitnet_lit.data.sources.files import find_text_of_one_split, text_source
from bitnet_lit.data.sources.source import Continuation, ReadCounts
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.data.write_shards import ShardEncoder
from bitnet_lit.errors import ModelError, UserError
from bitnet_lit.inference.language_model import LanguageModel
from bitnet_lit.inference.scoring import Scorer, Scores, Window

STDIN = "-"
BATCHES_AT_ONCE = 8
"""Batches whose windows are scored together: those of about one length run together."""


def check_files(files: Sequence[str]) -> None:
    """Refuse files that are not there, or of several splits of a data set, before a model is opened.

    Raises:
        UserError: a file is missing, or is no text file by its name; or there are several splits; one line.
    """
    for name in files:
        if name != STDIN:
            find_text_of_one_split(name, "data")


def documents(files: Sequence[str], column: str | None = None) -> Iterator[str]:
    """Yield the documents of files, folders and globs; of standard input for "-".

    Args:
        column: the column of a table, or the key of a JSON record, that has the text.

    Raises:
        UserError: a file is missing, is no text, or holds none; one line.
    """
    for name in files:
        if name != STDIN:
            yield from _stories(name, column)
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "stdin.txt")
            with path.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            if not path.stat().st_size:
                raise UserError("data=-: standard input is empty: give it a text")
            try:
                yield from _stories(str(path), column)
            except UserError as error:
                raise UserError(str(error).replace(f"data={path}", "data=-").replace(str(path), "data=-")) from None


def _stories(name: str, column: str | None) -> Iterator[str]:
    source = text_source(name, column, "data")
    if source.passed_over:
        warnings.warn(f"data={name}: not read: {source.passed_over}", stacklevel=2)
    counts, number = ReadCounts(), 0
    for shard in source.shards:
        for segment in shard.segments:
            for story in segment.stories(counts):
                number += 1
                yield story
    if not number:
        raise UserError(f"data={name}: holds no text but white space: give another file")


def sliding_windows(num_tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield windows that predict each token of a document but the first once.

    Args:
        num_tokens: tokens of the document, with BOS in front.
        length: the most tokens that a window reads.
        stride: the most tokens that a window but the first predicts, 1 to `length`.

    Yields:
        Where the tokens of a window begin and end, and how many of them are only read.
    """
    predicted, step, last = 0, length, num_tokens - 1
    while predicted < last:
        end = min(predicted + step, last)
        begin = max(0, end - length)
        yield begin, end + 1, predicted + 1 - begin
        predicted, step = end, stride


@dataclass
class TextSums:
    """Holds sums over documents, from which the figures follow.

    Attributes:
        nats: sum of the losses.
        correct: tokens that had the largest logit.
        bytes: of UTF-8.
        words: parts between white space.
    """

    nats: float = 0.0
    correct: int = 0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    documents: int = 0

    def add_text(self, text: str) -> None:
        """Count a document; a `Continuation` belongs to the one before it, and has no word in front of its space."""
        goes_on = isinstance(text, Continuation)
        self.documents += not goes_on
        self.bytes += len(text.encode())
        self.words += len(re.split(r"\s+", text)) - goes_on

    def add_scores(self, scores: Scores) -> None:
        """Add what a model says of some tokens."""
        self.nats += float(scores.losses.sum(dtype=np.float64))
        self.correct += int(scores.hits.sum())
        self.tokens += len(scores.losses)

    def metrics(self) -> dict[str, float]:
        """Return the figures; the module says what they are."""

        def perplexity(count: int) -> float:
            return math.exp(min(self.nats / count, 700.0))  # exp(710) is no float64

        return {
            "loss": self.nats / self.tokens,
            "perplexity": perplexity(self.tokens),
            "accuracy": self.correct / self.tokens,
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "word_perplexity": perplexity(self.words),
            "byte_perplexity": perplexity(self.bytes),
        }


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer, sums: TextSums) -> Iterator[NDArray[np.integer[Any]]]:
    """Yield the ids of each document, (N,) with BOS in front, and count its text."""
    encoder = ShardEncoder(tokenizer)
    parts: list[NDArray[np.integer[Any]]] = []
    for text in texts:
        if parts and not isinstance(text, Continuation):
            yield np.concatenate(parts)
            parts = []
        sums.add_text(text)
        parts.append(np.frombuffer(encoder(text), dtype=encoder.dtype))
    if parts:
        yield np.concatenate(parts)


def score_documents(
    texts: Iterable[str], tokenizer: Tokenizer, scorer: Scorer, length: int, stride: int, windows_at_once: int
) -> TextSums:
    """Score documents, some windows at a time: a long text takes the memory of its ids alone."""
    sums = TextSums()
    windows = (
        Window(ids[begin:end].tolist(), start)
        for ids in encode_documents(texts, tokenizer, sums)
        for begin, end, start in sliding_windows(len(ids), length, stride)
    )
    while some := list(islice(windows, windows_at_once)):
        for scores in scorer.score(some):
            sums.add_scores(scores)
    return sums


def native_scorer(path: Path) -> Scorer:
    """Return the scorer of a model on the CPU: that of the native engine, exact, or of PyTorch where it must."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "head=float, kv_cache=float: no effect")  # where PyTorch runs the model
        return LanguageModel(path, EngineConfig(head="float", kv_cache="float")).scorer()


def evaluate_text(config: EvaluateConfig, scorer: Scorer, tokenizer: Tokenizer | None, length: int) -> dict[str, Any]:
    """Return the figures of text, and what they were measured on.

    Args:
        length: tokens that a window reads.

    Raises:
        UserError: no text, no tokenizer, or a stride beyond the window.
        ModelError: a loss is not finite.
    """
    files, stride = config.data.files, config.stride
    if tokenizer is None:
        raise UserError(f"data={files[0]}: the model has no tokenizer for text: give data_dir=<folder of shards>")
    chosen = stride or max(1, length // 2)
    if chosen > length:
        raise UserError(f"stride={stride}: is beyond the window of {length} tokens: give {length} or less")
    sums = score_documents(
        documents(files, config.column), tokenizer, scorer, length, chosen, BATCHES_AT_ONCE * config.batch_size
    )
    if not sums.tokens:
        raise UserError(f"data={files[0]}: has no token to predict: give another file")
    if not math.isfinite(sums.nats):
        raise ModelError(f"the loss is {sums.nats}: what the weights compute overflows: train the model again")
    counts = {name: getattr(sums, name) for name in ("tokens", "words", "bytes", "documents")}
    return {**sums.metrics(), **counts, "sequence_length": length, "stride": chosen, "data": ", ".join(files)}
