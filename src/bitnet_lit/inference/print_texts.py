"""`infer` reads prompts and writes texts to stdout; `python -m bitnet_lit.infer` calls it.

The prompts come from the command line, from a file, or from the keyboard. Stdout gets the texts and nothing else. On a
terminal the prompt is dimmed, and the model and a line of statistics go to stderr, unless quiet=true. Warnings always
go to stderr, one line each.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from bitnet_lit.config import InferConfig
from bitnet_lit.entry_point import ended_by_ctrl_c
from bitnet_lit.errors import UserError
from bitnet_lit.inference.language_model import LanguageModel

SEPARATOR = "---"
DIM, PLAIN = "\033[2m", "\033[0m"


class _Page:
    """Writes texts that are generated together to stdout, one after the other.

    The first text is written piece by piece as it comes. The others wait until it is complete.
    """

    def __init__(self, prompts: Sequence[str], fancy: bool) -> None:
        self._fancy = fancy
        self._waiting = [self._dimmed(prompt) for prompt in prompts]
        self.texts = list(prompts)
        self._write(self._waiting[0])

    def _dimmed(self, prompt: str) -> str:
        return f"{DIM}{prompt}{PLAIN}" if self._fancy else prompt

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def add(self, number: int, piece: str) -> None:
        """Take the next piece of a text."""
        self.texts[number] += piece
        if number == 0:
            self._write(piece)
        else:
            self._waiting[number] += piece

    def close(self) -> None:
        """Write everything that has not been written yet."""
        for text in self._waiting[1:]:
            self._write(f"\n{SEPARATOR}\n{text}")
        self._write("\n")


def _print_texts(model: LanguageModel, config: InferConfig, prompts: Sequence[str], fancy: bool) -> list[str]:
    """Generate `num_samples` texts from each prompt, some at a time. Return them, prompts included."""
    texts: list[str] = []
    every = (prompt for prompt in prompts for _ in range(config.num_samples))
    while some := list(islice(every, model.engine.texts_at_once)):
        if texts:
            print(SEPARATOR)
        pieces = model.generator.stream_batch(some, config, index=len(texts))
        page = _Page(some, fancy)
        try:
            for number, piece in pieces:
                page.add(number, piece)
        finally:
            page.close()
        if fancy:
            print(f"{DIM}{model.statistics}{PLAIN}", file=sys.stderr)
        texts += page.texts
    return texts


def _typed_prompts() -> Iterator[str]:
    """Yield lines from stdin until an empty one, the end of the input, or Ctrl-C.

    Raises:
        UserError: bytes that are no text in the encoding of stdin.
    """
    mark = "\ufeff"  # the byte order mark that some programs put before a text in UTF-8
    while True:
        prompt = ""
        with ended_by_ctrl_c(), contextlib.suppress(EOFError):
            try:
                prompt = input("> " if sys.stdin.isatty() else "").removeprefix(mark)
            except UnicodeDecodeError as error:
                raise UserError(f"a typed prompt: no text in {error.encoding}: set PYTHONIOENCODING=utf-8") from None
        if not prompt:
            return
        mark = ""
        yield prompt


def _prompts_of(path: Path) -> list[str]:
    """Return the lines of a file of prompts; of standard input for "-".

    Only line ends divide lines; str.splitlines would divide at form feeds and at Unicode's separators too. A byte order
    mark, which some editors put before a text in UTF-8, is no part of the first line.

    Raises:
        UserError: it cannot be read, or holds nothing.
    """
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"prompts={path}: cannot be read ({error.strerror}): give a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"prompts={path}: not a text in UTF-8: save it as such") from None
    if not text:
        raise UserError(f"prompts={path}: is empty: write a prompt on each line")
    lines = re.split(r"\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


def infer(config: InferConfig) -> list[str]:
    """Write the texts to stdout. Return them, prompts included.

    Raises:
        UserError: no model, no tokenizer, or no such device.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        fancy = sys.stdout.isatty() and not config.quiet
        prompts = [config.prompt] if config.prompts is None else _prompts_of(Path(config.prompts))
        model = LanguageModel(config.checkpoint, config, config.tokenizer)
        if warning := model.stored.info.get("warning"):
            warnings.warn(f"{model.stored.path}: {warning}", stacklevel=2)
        if fancy:
            about = (model.stored.path, model.config.name, model.stored.quant.name, model.engine.name)
            print(f"{DIM}{', '.join(map(str, about))}{PLAIN}", file=sys.stderr)
        if not config.interactive:
            return _print_texts(model, config, prompts, fancy)
        texts = []
        for prompt in _typed_prompts():
            with ended_by_ctrl_c():  # this text only
                texts += _print_texts(model, config, [prompt], fancy)
        return texts
