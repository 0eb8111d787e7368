"""Generation: prompts go in, and pieces of text come out as soon as they are final.

A text ends at EOS, at BOS (llama2.c's shards separate documents by BOS alone), at a stop text, after `max_new_tokens`,
or where the context ends. Of a prompt longer than the context the last tokens are kept, with a warning.

Each text has a state of its own (ids, cache, sampler, decoder), and each call too. So several threads can use one
`Generator`, and several streams can be read in turns.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bitnet_lit.config import GenerationConfig
from bitnet_lit.config.checks import COUNT, list_of_texts, require_whole
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.inference.drawing import start_drawing
from bitnet_lit.inference.engines import Engine
from bitnet_lit.inference.sampling import NotFiniteError, Sampler
from bitnet_lit.inference.stop_texts import StopFilter


@dataclass
class Statistics:
    """Statistics says how many tokens a text, or a batch of texts, had, and how long they took.

    Attributes:
        prompt_tokens: tokens of all prompts; equal prompts count once, because they are computed once.
        prompt_seconds: seconds by the wall clock until all prompts were read.
        new_tokens: tokens that were drawn, EOS included.
        new_seconds: seconds by the wall clock that drawing them took.
        reason: why the text ended: eos, stop, max_new_tokens or context. For a batch: every reason, by commas.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        rates = [
            f"{name} {tokens} tokens, {tokens / seconds:,.0f} tokens/s"
            for name, tokens, seconds in (
                ("prompt", self.prompt_tokens, self.prompt_seconds),
                ("generation", self.new_tokens, self.new_seconds),
            )
            if seconds
        ]
        return "; ".join([*rates, f"ended by {self.reason}"])


class _Text:
    """One text while it is generated.

    Attributes:
        ids: the tokens of the prompt and those drawn since.
        reason: why the text ended; empty while it goes on.
    """

    def __init__(self, ids: list[int], prompt_ids: Sequence[int], tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.ids = ids
        self.reason = ""
        self._ends = tokenizer.end_ids
        self._decoder, self._stops = tokenizer.stream_decoder(prompt_ids), StopFilter(stop)

    def take(self, token: int) -> str:
        """Take the token that was drawn; returns the text that is final with it, and sets `reason` where it ends."""
        if token in self._ends:
            return self.end("eos")
        self.ids.append(token)
        piece = self._stops.feed(self._decoder.feed(token))
        if self._stops.stopped:
            self.reason = "stop"
        return piece

    def end(self, reason: str) -> str:
        """End the text; returns the rest of it."""
        self.reason = reason
        piece = self._stops.feed(self._decoder.flush())
        return piece if self._stops.stopped else piece + self._stops.flush()


@dataclass
class Generator:
    """Generates texts with an engine.

    Attributes:
        find_damage: says what is wrong with a model whose logits are NaN or infinite, as the end of the error line.
        statistics: those of the text, or the batch, that was begun last.
    """

    engine: Engine
    tokenizer: Tokenizer
    find_damage: Callable[[], str] = str
    statistics: Statistics = field(default_factory=Statistics)

    def stream_batch(
        self, prompts: Sequence[str], options: GenerationConfig, index: int = 0
    ) -> Iterator[tuple[int, str]]:
        """Generate a text from each prompt; all texts take each decode step together.

        A text is the same alone and in a batch. (On a GPU the logits may differ in their last bits, and so a text.)

        Args:
            index: number of the first text, where several are drawn with one seed.

        Returns:
            Pieces as they become final: (number of the prompt, piece). The prompts are not among them.

        Raises:
            UserError: prompts that are no texts. It is raised by the call, not when the first piece is read.
            NotFiniteError: the logits are NaN or infinite.
        """
        prompts = list_of_texts("prompts", prompts)
        require_whole("index", index)
        COUNT.check("index", index)
        encoded = [self.tokenizer.encode(prompt) for prompt in prompts]
        return self._run([self._text(ids, ids, options) for ids in encoded], options, index)

    def generate_batch(self, prompts: Sequence[str], options: GenerationConfig, index: int = 0) -> list[str]:
        """Whole texts, prompts included; see `stream_batch`."""
        texts = list_of_texts("prompts", prompts)
        for number, piece in self.stream_batch(list(texts), options, index):
            texts[number] += piece
        return texts

    def continue_ids(self, prompts: Sequence[Sequence[int]], options: GenerationConfig, index: int = 0) -> list[str]:
        """Return the text that follows each prompt, as it is decoded by itself.

        A tokenizer that puts a space in front of each text takes one away there, so the continuation may lack it.

        Args:
            prompts: token ids, at least one each.
            options, index: as for `stream_batch`.

        Raises:
            NotFiniteError: the logits are NaN or infinite.
        """
        texts = [""] * len(prompts)
        for number, piece in self._run([self._text(ids, (), options) for ids in prompts], options, index):
            texts[number] += piece
        return texts

    def _text(self, ids: Sequence[int], decoded_behind: Sequence[int], options: GenerationConfig) -> _Text:
        return _Text(self._within_context(ids), decoded_behind, self.tokenizer, options.stop)

    def _run(self, texts: Sequence[_Text], options: GenerationConfig, index: int) -> Iterator[tuple[int, str]]:
        """Yield the pieces of `stream_batch`."""
        statistics = self.statistics = Statistics()
        if not texts:
            return
        samplers = [Sampler(options, index + number) for number in range(len(texts))]
        clock = time.perf_counter()
        pieces = self.tokenizer.vocab_size
        ids = [text.ids for text in texts]
        drawing = start_drawing(self.engine, ids, samplers, pieces, options.max_new_tokens)
        statistics.prompt_tokens = sum(map(len, set(map(tuple, ids))))
        statistics.prompt_seconds = time.perf_counter() - clock
        clock = time.perf_counter()
        active = list(range(len(texts)))
        for _ in range(options.max_new_tokens):
            tokens = drawing.draw(active)
            for number in active:
                text = texts[number]
                piece = text.take(self._next(tokens, text))
                statistics.new_tokens += 1
                statistics.new_seconds = time.perf_counter() - clock
                if not text.reason and len(text.ids) > self.engine.max_length:
                    piece += text.end("context")
                if piece:
                    yield number, piece
            active = [number for number in active if not texts[number].reason]
            if not active:
                break
        for number in active:
            if piece := texts[number].end("max_new_tokens"):
                yield number, piece
        statistics.reason = ", ".join(sorted({text.reason for text in texts}))

    def _within_context(self, ids: Sequence[int]) -> list[int]:
        room = max(1, self.engine.max_length - 1)
        if len(ids) > room:
            warnings.warn(
                f"the prompt has {len(ids)} tokens and the context {self.engine.max_length}: kept the last {room}",
                stacklevel=2,
            )
        return list(ids[-room:])

    def _next(self, tokens: Iterator[int], text: _Text) -> int:
        """The next token, with what is wrong with the model where its logits are NaN or infinite."""
        try:
            return next(tokens)
        except NotFiniteError:
            raise NotFiniteError(
                f"the model computes no numbers: the logits of token {len(text.ids)} are not finite{self.find_damage()}"
            ) from None
