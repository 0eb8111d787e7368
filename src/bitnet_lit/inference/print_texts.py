"""What `python -m bitnet_lit.infer` does: tell one story, several, or one per prompt that is given or
typed.

Stdout gets the text and nothing else. On a terminal the prompt is dimmed and a line of statistics goes to stderr; when
stdout is no terminal, or with quiet=true, not even that.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from bitnet_lit.config import InferConfig
from bitnet_lit.errors import UserError
from bitnet_lit.inference.language_model import LanguageModel

SEPARATOR = "---"
TEXTS_AT_ONCE = 8  # they share each pass over the weights; more would gain little, and every text takes memory
DIM, PLAIN = "\033[2m", "\033[0m"


class _Page:
    """Stdout, one text after the other: the pieces of the first unfinished text as they come, later ones when it is
    their turn."""

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
        """A piece of text `number`."""
        self.texts[number] += piece
        if number == 0:
            self._write(piece)
        else:
            self._waiting[number] += piece

    def close(self) -> None:
        """Everything that has not been written yet."""
        for text in self._waiting[1:]:
            self._write(f"\n{SEPARATOR}\n{text}")
        self._write("\n")


def _tell(model: LanguageModel, config: InferConfig, prompts: Sequence[str], index: int, fancy: bool) -> list[str]:
    """Write texts to stdout, the first as it comes; returns them, prompts included."""
    pieces = model.generator.stream_batch(prompts, config, index)
    page = _Page(prompts, fancy)
    try:
        for number, piece in pieces:
            page.add(number, piece)
    finally:
        page.close()
    if fancy:
        print(f"{DIM}{model.statistics}{PLAIN}", file=sys.stderr)
    return page.texts


def _typed_prompts() -> Iterator[str]:
    """Lines from stdin until an empty one, the end of input, or Ctrl-C."""
    mark = "\ufeff"  # what some programs put before a text in UTF-8 that they send
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "").removeprefix(mark)
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            raise UserError(f"a typed prompt: no text in {error.encoding}: set PYTHONIOENCODING=utf-8") from None
        if not prompt:
            return
        mark = ""
        yield prompt


def _prompts_of(path: Path) -> list[str]:
    """The lines of a file of prompts.

    Only line ends divide lines (str.splitlines divides at form feeds and at Unicode's separators too), and the mark
    that some editors put before a text in UTF-8 is no part of the first.

    Raises:
        UserError: it cannot be read, or holds nothing.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"prompts={path}: cannot be read ({error.strerror}): give a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"prompts={path}: not a text in UTF-8: save it as such") from None
    if not text:
        raise UserError(f"prompts={path}: is empty: write a prompt on each line")
    lines = re.split(r"\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


def infer(config: InferConfig) -> list[str]:
    """Write texts to stdout; returns them, prompts included.

    Raises:
        UserError: no model, no tokenizer, or no such device.
    """
    fancy = sys.stdout.isatty() and not config.quiet
    # One line, not Python's file, line and source text, for the notice about long prompts.
    warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
    prompts = [config.prompt] if config.prompts is None else _prompts_of(Path(config.prompts))
    prompts = [prompt for prompt in prompts for _ in range(config.num_samples)]
    model = LanguageModel(config.checkpoint, config, config.tokenizer)
    if fancy:
        print(
            f"{DIM}{model.stored.path}, {model.config.name}, {model.stored.quant.name}, {model.engine.name}{PLAIN}",
            file=sys.stderr,
        )
    texts = []
    try:
        if config.interactive:
            for prompt in _typed_prompts():
                try:
                    texts += _tell(model, config, [prompt], 0, fancy)
                except KeyboardInterrupt:
                    continue  # ends this text only
            return texts
        for index in range(0, len(prompts), TEXTS_AT_ONCE):
            if index:
                print(SEPARATOR)
            texts += _tell(model, config, prompts[index : index + TEXTS_AT_ONCE], index, fancy)
    except BrokenPipeError:
        # The reader went away (infer | head): leave, and keep Python from failing again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return texts
