"""Text from an engine: prompt in, pieces of text out as they become final.

A text ends at EOS or BOS (llama2.c's shards separate stories by BOS alone), at a stop text, at `max_new_tokens`, or
where the context ends. Of a prompt that leaves no room in the context the last tokens are kept, and a warning says
so.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.data.tokenizer import Tokenizer
from bitnet_lit.inference.engines import Cache, Engine
from bitnet_lit.inference.sampling import Sampler, SamplingOptions


@dataclass
class Statistics:
    """What a text, or a batch of them, cost; seconds by the wall clock."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0
    reason: str = ""
    """Why it ended: eos, stop, max_new_tokens or context; of a batch, every reason there was."""

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


class _StopFilter:
    """Passes text on, but holds back what may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that is certain to be no stop text; sets `stopped` when one is complete."""
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        passed, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return passed

    def flush(self) -> str:
        """What is still held back: it turned out to be no stop text."""
        held, self._held = self._held, ""
        return held


class _Text:
    """One text in the making.

    Attributes:
        ids: prompt and what was drawn.
        cache: what the engine has of it, once the prompt was read.
        reason: why it ended; empty while it goes on.
    """

    cache: Cache

    def __init__(
        self, ids: list[int], prompt_ids: Sequence[int], sampler: Sampler, tokenizer: Tokenizer, stop: Sequence[str]
    ) -> None:
        self.ids, self.sampler = ids, sampler
        self.reason = ""
        self._ends, self._pieces = (tokenizer.eos_id, tokenizer.bos_id), tokenizer.vocab_size
        self._decoder, self._stops = tokenizer.stream_decoder(prompt_ids), _StopFilter(stop)

    def draw(self, logits: NDArray[np.float32]) -> str:
        """Draw the next token; returns what has become final by it, and sets `reason` where it ends the text."""
        token = self.sampler.draw(logits[: self._pieces], self.ids)  # a padded vocabulary has rows without a piece
        if token in self._ends:
            return self.end("eos")
        self.ids.append(token)
        piece = self._stops.feed(self._decoder.feed(token))
        if self._stops.stopped:
            self.reason = "stop"
        return piece

    def end(self, reason: str) -> str:
        """The rest of the text."""
        self.reason = reason
        piece = self._stops.feed(self._decoder.flush())
        return piece if self._stops.stopped else piece + self._stops.flush()


@dataclass
class Generator:
    """Generates texts.

    Attributes:
        statistics: of the last text, or of the last batch together.
    """

    engine: Engine
    tokenizer: Tokenizer
    statistics: Statistics = field(default_factory=Statistics)

    def _within_context(self, ids: list[int]) -> list[int]:
        room = self.engine.max_length - 1
        if len(ids) > room:
            warnings.warn(
                f"the prompt has {len(ids)} tokens and the context {self.engine.max_length}: kept the last {room}",
                stacklevel=2,
            )
        return ids[-room:]

    def _read_prompts(self, texts: Sequence[_Text]) -> list[NDArray[np.float32]]:
        """Fill the caches, all prompts in one step and equal ones once; logits of each text."""
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
        self.statistics.prompt_tokens = sum(map(len, of_prompt))
        return [first[id(text)] for text in texts]

    def stream_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 256,
        seed: int | None = None,
        index: int = 0,
        stop: Sequence[str] = (),
        **sampling: float | int,
    ) -> Iterator[tuple[int, str]]:
        """Pieces of the texts that go on from `prompts`, as they become final: (number of the prompt, piece).

        All texts take each step together. A text is the same alone and in a batch.

        Args:
            index: number of the first sample, where several are drawn with one seed.
            stop: texts that end one; they are left out.
            **sampling: fields of `SamplingOptions`.
        """
        statistics = self.statistics = Statistics()
        options = SamplingOptions(**sampling)  # type: ignore[arg-type]
        texts = []
        for number, prompt in enumerate(prompts):
            prompt_ids = self.tokenizer.encode(prompt)
            sampler = Sampler(options, seed, index + number)
            ids = self._within_context(prompt_ids)
            texts.append(_Text(ids, prompt_ids, sampler, self.tokenizer, stop))
        clock = time.perf_counter()
        logits = self._read_prompts(texts)
        statistics.prompt_seconds = time.perf_counter() - clock
        clock = time.perf_counter()
        active = list(enumerate(texts))
        for step in range(max_new_tokens):
            for (number, text), row in zip(active, logits, strict=True):
                piece = text.draw(row)
                statistics.new_tokens += 1
                statistics.new_seconds = time.perf_counter() - clock
                if not text.reason and text.cache.length >= self.engine.max_length:
                    piece += text.end("context")
                if piece:
                    yield number, piece
            active = [(number, text) for number, text in active if not text.reason]
            if not active or step == max_new_tokens - 1:
                break
            logits = list(
                self.engine.forward([text.ids[-1:] for _, text in active], [text.cache for _, text in active])
            )
        for number, text in active:
            if piece := text.end("max_new_tokens"):
                yield number, piece
        statistics.reason = ", ".join(sorted({text.reason for text in texts}))

    def stream(self, prompt: str, **options: object) -> Iterator[str]:
        """Pieces of the text that goes on from `prompt` (which is not among them), as they become final.

        Args:
            prompt: may be empty: the text then starts by itself.
            **options: as for `stream_batch`.
        """
        return (piece for _, piece in self.stream_batch([prompt], **options))  # type: ignore[arg-type]

    def generate(self, prompt: str, **options: object) -> str:
        """The whole text, prompt included; options as for `stream_batch`."""
        return prompt + "".join(self.stream(prompt, **options))

    def generate_batch(self, prompts: Sequence[str], **options: object) -> list[str]:
        """Whole texts, prompts included; options as for `stream_batch`."""
        texts = list(prompts)
        for number, piece in self.stream_batch(prompts, **options):  # type: ignore[arg-type]
            texts[number] += piece
        return texts
