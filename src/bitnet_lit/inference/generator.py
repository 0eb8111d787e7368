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

from bitnet_lit.data.tokenizer import Tokenizer
from bitnet_lit.inference.engines import Engine
from bitnet_lit.inference.sampling import Sampler, SamplingOptions


@dataclass
class Statistics:
    """What one text cost; seconds by the wall clock."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0
    reason: str = ""
    """Why it ended: eos, stop, max_new_tokens or context."""

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


@dataclass
class Generator:
    """Generates texts one after the other.

    Attributes:
        statistics: of the last text.
    """

    engine: Engine
    tokenizer: Tokenizer
    statistics: Statistics = field(default_factory=Statistics)

    def tokens(
        self, prompt_ids: Sequence[int], sampler: Sampler, max_new_tokens: int, statistics: Statistics
    ) -> Iterator[int]:
        """New token ids, one at a time, until one of the ends; fills in `statistics`."""
        engine, ids = self.engine, list(prompt_ids)
        room = engine.max_length - 1
        if len(ids) > room:
            warnings.warn(
                f"the prompt has {len(ids)} tokens and the context {engine.max_length}: kept the last {room}",
                stacklevel=2,
            )
            ids = ids[-room:]
        engine.reset()
        clock = time.perf_counter()
        logits = engine.forward(ids)
        statistics.prompt_tokens, statistics.prompt_seconds = len(ids), time.perf_counter() - clock
        statistics.reason = "max_new_tokens"
        clock = time.perf_counter()
        for number in range(max_new_tokens):
            if number:
                if engine.length >= engine.max_length:
                    statistics.reason = "context"
                    return
                logits = engine.forward(ids[-1:])
            token = sampler.draw(logits, ids)
            statistics.new_tokens, statistics.new_seconds = number + 1, time.perf_counter() - clock
            if token in (self.tokenizer.eos_id, self.tokenizer.bos_id):
                statistics.reason = "eos"
                return
            ids.append(token)
            yield token

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        seed: int | None = None,
        index: int = 0,
        stop: Sequence[str] = (),
        **sampling: float | int,
    ) -> Iterator[str]:
        """Pieces of the text that goes on from `prompt` (which is not among them), as they become final.

        Args:
            prompt: may be empty: the text then starts by itself.
            index: number of the sample, where several are drawn with one seed.
            stop: texts that end it; they are left out.
            **sampling: fields of `SamplingOptions`.
        """
        statistics = self.statistics = Statistics()
        sampler = Sampler(SamplingOptions(**sampling), seed, index)  # type: ignore[arg-type]
        prompt_ids = self.tokenizer.encode(prompt)
        decoder, stops = self.tokenizer.stream_decoder(prompt_ids), _StopFilter(stop)
        for token in self.tokens(prompt_ids, sampler, max_new_tokens, statistics):
            if piece := stops.feed(decoder.feed(token)):
                yield piece
            if stops.stopped:
                statistics.reason = "stop"
                return
        piece = stops.feed(decoder.flush())
        if not stops.stopped:
            piece += stops.flush()
        if piece:
            yield piece

    def generate(self, prompt: str, **options: object) -> str:
        """The whole text, prompt included; options as for `stream`."""
        return prompt + "".join(self.stream(prompt, **options))  # type: ignore[arg-type]
