"""Text from an engine: prompt in, pieces of text out as they become final.

A text ends at EOS or BOS (llama2.c's shards separate stories by BOS alone), at a stop text, at `max_new_tokens`, or
where the context ends. Of a prompt that leaves no room in the context the last tokens are kept, and a warning says
so.

A text keeps its own state (ids, cache, sampler, decoder), and so does each call; several threads can use one
`Generator`, and streams can be read in turns.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.inference.engines import Cache, Engine
from bitnet_lit.inference.sampling import NotFiniteError, Sampler, SamplingOptions, require_whole


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


class _Stop:
    """How much of one stop text the end of a text matches, character by character (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self._shorter = [0]  # of each beginning, the longest shorter one that it ends with
        for end in range(1, len(text)):
            length = self._shorter[end - 1]
            while length and text[length] != text[end]:
                length = self._shorter[length - 1]
            self._shorter.append(length + (text[length] == text[end]))

    def feed(self, character: str) -> bool:
        """Whether the stop text is complete."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self.text[self.matched] == character
        return self.matched == len(self.text)


class _StopFilter:
    """Passes text on, but holds back what may be the beginning of a stop text. The stop text that is complete first
    ends the text, whatever pieces it comes in; of several at once the longest."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [_Stop(stop) for stop in dict.fromkeys(stops) if stop]
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that is certain to be no stop text; sets `stopped` when one is complete."""
        before = self._held
        self._held += text
        if not self._stops:
            return self.flush()
        for end, character in enumerate(text, len(before) + 1):
            complete = [stop.matched for stop in self._stops if stop.feed(character)]
            if complete:
                self.stopped = True
                return self._held[: end - max(complete)]
        keep = max(stop.matched for stop in self._stops)
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


def _texts(key: str, texts: Sequence[str]) -> list[str]:
    """A list of texts, whatever sequence they come in.

    Raises:
        UserError: a single text, whose characters would be taken for texts; or something in it that is none.
    """
    if isinstance(texts, str | bytes) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{key}={texts!r:.100}: must be a list of texts")
    return list(texts)


@dataclass
class Generator:
    """Generates texts.

    Attributes:
        find_damage: what may be wrong with a model that computes no numbers, as the end of a line.
        statistics: of the text, or of the batch, that was begun last.
    """

    engine: Engine
    tokenizer: Tokenizer
    find_damage: Callable[[], str] = str
    statistics: Statistics = field(default_factory=Statistics)

    def _within_context(self, ids: list[int]) -> list[int]:
        room = max(1, self.engine.max_length - 1)
        if len(ids) > room:
            warnings.warn(
                f"the prompt has {len(ids)} tokens and the context {self.engine.max_length}: kept the last {room}",
                stacklevel=2,
            )
        return ids[-room:]

    def _read_prompts(self, texts: Sequence[_Text], statistics: Statistics) -> list[NDArray[np.float32]]:
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
        statistics.prompt_tokens = sum(map(len, of_prompt))
        return [first[id(text)] for text in texts]

    def _draw(self, text: _Text, logits: NDArray[np.float32]) -> str:
        """Draw as `_Text.draw` does; say what is wrong with a model that computes no numbers."""
        try:
            return text.draw(logits)
        except NotFiniteError:
            raise NotFiniteError(
                f"the model computes no numbers: the logits of token {len(text.ids)} are not finite{self.find_damage()}"
            ) from None

    def stream_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 256,
        seed: int | None = None,
        index: int = 0,
        stop: str | Sequence[str] = (),
        **sampling: float | int,
    ) -> Iterator[tuple[int, str]]:
        """Pieces of the texts that go on from `prompts`, as they become final: (number of the prompt, piece).

        All texts take each step together. A text is the same alone and in a batch.

        Args:
            index: number of the first sample, where several are drawn with one seed.
            stop: a text, or several, that end one; they are left out.
            **sampling: fields of `SamplingOptions`.

        Raises:
            UserError: an option that cannot be.
            NotFiniteError: the model computes no numbers.
        """
        options = SamplingOptions(**sampling)  # type: ignore[arg-type]
        require_whole("max_new_tokens", max_new_tokens, least=0)
        require_whole("index", index, least=0)
        if seed is not None:
            require_whole("seed", seed)
        prompts = _texts("prompts", prompts)
        stops = [stop] if isinstance(stop, str) else _texts("stop", stop)
        samplers = [Sampler(options, seed, index + number) for number in range(len(prompts))]
        return self._run(prompts, samplers, max_new_tokens, stops)

    def _run(
        self, prompts: Sequence[str], samplers: Sequence[Sampler], max_new_tokens: int, stops: Sequence[str]
    ) -> Iterator[tuple[int, str]]:
        """Yield the pieces of `stream_batch`, from options that were checked."""
        statistics = self.statistics = Statistics()
        if not prompts:
            return
        texts = []
        for prompt, sampler in zip(prompts, samplers, strict=True):
            prompt_ids = self.tokenizer.encode(prompt)
            ids = self._within_context(prompt_ids)
            texts.append(_Text(ids, prompt_ids, sampler, self.tokenizer, stops))
        clock = time.perf_counter()
        logits = self._read_prompts(texts, statistics)
        statistics.prompt_seconds = time.perf_counter() - clock
        clock = time.perf_counter()
        active = list(enumerate(texts))
        for step in range(max_new_tokens):
            for (number, text), row in zip(active, logits, strict=True):
                piece = self._draw(text, row)
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
