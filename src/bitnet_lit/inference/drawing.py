"""A `Drawing` goes from prompts to tokens, one for each text at a time.

`HostDrawing` works with any engine: the engine computes logits, and `Sampler` draws on the CPU. An engine that draws on
its own device has a method `drawing` that returns a `Drawing` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from bitnet_lit.inference.engines import Cache, Engine
from bitnet_lit.inference.sampling import Sampler

Logits = TypeVar("Logits")


class Drawing(Protocol):
    """Draws the tokens of texts while they are generated."""

    def draw(self, texts: Sequence[int]) -> Iterator[int]:
        """Draw the next token of each of these texts, which have not ended; yields them in this order.

        A text that was left out once has ended.

        Raises:
            NotFiniteError: the logits of the text whose token is next are NaN or infinite.
        """


def read_prompts(
    prompts: Sequence[Sequence[int]],
    new_cache: Callable[[], Any],
    forward: Callable[[list[Sequence[int]], list[Any]], Iterable[Logits]],
) -> tuple[list[Any], list[Logits]]:
    """Read all prompts in one step, equal prompts once.

    Args:
        prompts: token ids of each text.
        new_cache, forward: of the engine.

    Returns:
        A cache for each text, and the logits behind each prompt.
    """
    of_prompt: dict[tuple[int, ...], list[int]] = {}
    for number, ids in enumerate(prompts):
        of_prompt.setdefault(tuple(ids), []).append(number)
    caches = [new_cache() for _ in of_prompt]
    logits = forward(list(of_prompt), caches)
    cache_of: dict[int, Cache] = {}
    logits_of: dict[int, Logits] = {}
    for row, cache, same in zip(logits, caches, of_prompt.values(), strict=True):
        for number in same:
            cache_of[number] = cache if number == same[0] else cache.fork()
            logits_of[number] = row
    numbers = range(len(prompts))
    return [cache_of[number] for number in numbers], [logits_of[number] for number in numbers]


class HostDrawing:
    """Is a `Drawing` for any engine: logits come to the CPU, which draws.

    Args:
        ids: the prompt of each text; the caller appends the tokens that were drawn.
        samplers: one for each text.
        pieces: tokens that may be drawn: a padded vocabulary has rows without a piece.
    """

    def __init__(self, engine: Engine, ids: Sequence[list[int]], samplers: Sequence[Sampler], pieces: int) -> None:
        self._engine, self._ids, self._samplers, self._pieces = engine, ids, samplers, pieces
        self._caches, logits = read_prompts(
            ids, engine.new_cache, lambda new, caches: list(engine.forward(new, caches))
        )
        self._logits = dict(enumerate(logits))

    def draw(self, texts: Sequence[int]) -> Iterator[int]:
        """See `Drawing`."""
        of_text, self._logits = self._logits, {}
        if not of_text:
            logits = self._engine.forward([self._ids[i][-1:] for i in texts], [self._caches[i] for i in texts])
            of_text = dict(zip(texts, logits, strict=True))
        for i in texts:
            yield self._samplers[i].draw(of_text[i][: self._pieces], self._ids[i])


def start_drawing(
    engine: Engine, ids: Sequence[list[int]], samplers: Sequence[Sampler], pieces: int, max_new_tokens: int
) -> Drawing:
    """Read the prompts of texts, and return what draws their tokens: the engine itself where it can.

    Args:
        ids, samplers, pieces: see `HostDrawing`. All samplers have the same options.
        max_new_tokens: the most tokens that will be drawn for a text.
    """
    own = getattr(engine, "drawing", None)
    drawing = own(ids, samplers, pieces, max_new_tokens) if own else None
    return drawing or HostDrawing(engine, ids, samplers, pieces)
