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

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.config import GenerationConfig
from bitnet_lit.config.checks import COUNT, list_of_texts, require_whole
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.inference.engines import Cache, Engine
from bitnet_lit.inference.sampling import NotFiniteError, Sampler
from bitnet_lit.inference.stop_texts import StopFilter


@dataclass
class Statistics:
    """What a text, or a batch of texts, cost.

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
        cache: the engine's keys and values of these tokens; set once the prompt was read.
        reason: why the text ended; empty while it goes on.
    """

    cache: Cache

    def __init__(
        self, ids: list[int], prompt_ids: Sequence[int], sampler: Sampler, tokenizer: Tokenizer, stop: Sequence[str]
    ) -> None:
        self.ids, self.sampler = ids, sampler
        self.reason = ""
        self._ends, self._pieces = (tokenizer.eos_id, tokenizer.bos_id), tokenizer.vocab_size
        self._decoder, self._stops = tokenizer.stream_decoder(prompt_ids), StopFilter(stop)

    def draw(self, logits: NDArray[np.float32]) -> str:
        """Draw the next token; returns the text that is final with it, and sets `reason` where it ends the text."""
        token = self.sampler.draw(logits[: self._pieces], self.ids)  # a padded vocabulary has rows without a piece
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

        A text is the same alone and in a batch.

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
        samplers = [Sampler(options, index + number) for number in range(len(prompts))]
        return self._run(prompts, samplers, options)

    def generate_batch(self, prompts: Sequence[str], options: GenerationConfig, index: int = 0) -> list[str]:
        """Whole texts, prompts included; see `stream_batch`."""
        texts = list(prompts)
        for number, piece in self.stream_batch(prompts, options, index):
            texts[number] += piece
        return texts

    def _run(
        self, prompts: Sequence[str], samplers: Sequence[Sampler], options: GenerationConfig
    ) -> Iterator[tuple[int, str]]:
        """Yield the pieces of `stream_batch`."""
        statistics = self.statistics = Statistics()
        if not prompts:
            return
        texts = []
        for prompt, sampler in zip(prompts, samplers, strict=True):
            prompt_ids = self.tokenizer.encode(prompt)
            ids = self._within_context(prompt_ids)
            texts.append(_Text(ids, prompt_ids, sampler, self.tokenizer, options.stop))
        clock = time.perf_counter()
        logits = self._read_prompts(texts, statistics)
        statistics.prompt_seconds = time.perf_counter() - clock
        clock = time.perf_counter()
        active = list(enumerate(texts))
        for step in range(options.max_new_tokens):
            for (number, text), row in zip(active, logits, strict=True):
                piece = self._draw(text, row)
                statistics.new_tokens += 1
                statistics.new_seconds = time.perf_counter() - clock
                if not text.reason and text.cache.length >= self.engine.max_length:
                    piece += text.end("context")
                if piece:
                    yield number, piece
            active = [(number, text) for number, text in active if not text.reason]
            if not active or step == options.max_new_tokens - 1:
                break
            logits = list(
                self.engine.forward([text.ids[-1:] for _, text in active], [text.cache for _, text in active])
            )
        for number, text in active:
            if piece := text.end("max_new_tokens"):
                yield number, piece
        statistics.reason = ", ".join(sorted({text.reason for text in texts}))

    def _within_context(self, ids: list[int]) -> list[int]:
        room = max(1, self.engine.max_length - 1)
        if len(ids) > room:
            warnings.warn(
                f"the prompt has {len(ids)} tokens and the context {self.engine.max_length}: kept the last {room}",
                stacklevel=2,
            )
        return ids[-room:]

    def _read_prompts(self, texts: Sequence[_Text], statistics: Statistics) -> list[NDArray[np.float32]]:
        """Fill the caches from the prompts, all in one step and equal prompts once; returns the logits of each text."""
        of_prompt: dict[tuple[int, ...], list[_Text]] = {}
        for text in texts:
            of_prompt.setdefault(tuple(text.ids), []).append(text)
        caches = [self.engine.new_cache() for _ in of_prompt]
        logits = self.engine.forward(list(of_prompt), caches)
        first: dict[int, NDArray[np.float32]] = {}
        for row, cache, same in zip(logits, caches, of_prompt.values(), strict=True):
            for text in same:
                text.cache = cache if text is same[0] else cache.fork()
                first[id(text)] = row
        statistics.prompt_tokens = sum(map(len, of_prompt))
        return [first[id(text)] for text in texts]

    def _draw(self, text: _Text, logits: NDArray[np.float32]) -> str:
        """`_Text.draw`, with what is wrong with the model where its logits are NaN or infinite."""
        try:
            return text.draw(logits)
        except NotFiniteError:
            raise NotFiniteError(
                f"the model computes no numbers: the logits of token {len(text.ids)} are not finite{self.find_damage()}"
            ) from None
