"""With a `CudaDrawing` the GPU goes on with texts by itself.

The token that a step draws is the token that the next step reads, without passing through the host. The host only has
to decode it: so one step is always launched ahead, and the GPU computes while Python looks at the token before. A text
that turns out to have ended has then taken part in one step too many, which is forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bitnet_lit.inference.engines.cuda.cache import CudaCache
from bitnet_lit.inference.engines.cuda.sampling import (
    LONGEST_WINDOW,
    UNIFORMS,
    SamplingState,
    Variant,
    option_numbers,
    sample,
)
from bitnet_lit.inference.engines.cuda.step import round_up
from bitnet_lit.inference.sampling import NotFiniteError, Sampler

if TYPE_CHECKING:
    from bitnet_lit.inference.engines.cuda.engine import CudaEngine


@dataclass
class _Launched:
    """Is a step whose tokens are on their way to the host.

    Attributes:
        texts: the text in each row.
        drawn: int64 (rows,), memory of the host that has the tokens once `event` has happened.
    """

    texts: list[int]
    drawn: Tensor
    event: torch.cuda.Event


class CudaDrawing:
    """Is a `bitnet_lit.inference.drawing.Drawing` on the GPU.

    Args:
        caches, logits: of each text behind its prompt; logits float32 (V,) on the GPU.
        ids: the prompts.
        samplers: their options, all the same, say how to draw; their random numbers are sent ahead.
        variant: of these options.
        max_new_tokens: the most tokens that will be drawn.
    """

    def __init__(
        self,
        engine: CudaEngine,
        caches: Sequence[CudaCache],
        logits: Sequence[Tensor],
        ids: Sequence[Sequence[int]],
        samplers: Sequence[Sampler],
        variant: Variant,
        max_new_tokens: int,
    ) -> None:
        self._engine, self._caches, self._samplers, self._variant = engine, caches, samplers, variant
        self._steps_left = max_new_tokens
        self._texts = list(range(len(ids)))  # the text of each row
        self._launched: deque[_Launched] = deque()
        self._uniforms_left = 0
        self._rows = engine.take_rows(round_up(len(ids)))
        state = self._rows.sampling
        state.options.copy_(torch.tensor(option_numbers(samplers[0].options, variant.pieces)))
        if variant.penalty:
            recent = torch.zeros(len(ids), LONGEST_WINDOW, dtype=torch.int64)
            for row, tokens in zip(recent, ids, strict=True):
                for position in range(max(0, len(tokens) - LONGEST_WINDOW), len(tokens)):
                    row[position % LONGEST_WINDOW] = tokens[position]
            state.recent[: len(ids)] = recent.to(state.recent.device)
        state.length[: len(ids)] = torch.tensor([len(tokens) for tokens in ids]).to(state.length.device)
        with engine.lock:
            self._send_uniforms()
            self._rows.logits[: len(ids)] = torch.stack(list(logits))
            sample(self._rows.logits, state, self._rows.position, variant, advance=False)
            self._fetch()

    def __del__(self) -> None:
        if hasattr(self, "_rows"):
            self._engine.give_rows(self._rows)

    def draw(self, texts: Sequence[int]) -> Iterator[int]:
        """See `Drawing`."""
        with self._engine.lock, torch.cuda.device(self._engine.device):
            if self._steps_left > 0:
                self._launch(texts)
        step = self._launched.popleft()
        step.event.synchronize()
        token_of = dict(zip(step.texts, step.drawn.tolist(), strict=False))
        for text in texts:
            if token_of[text] < 0:
                raise NotFiniteError("logits are not finite")
            yield token_of[text]

    def _fetch(self) -> None:
        """Note where the tokens of the step that was just launched will be."""
        event = torch.cuda.Event()
        event.record()
        drawn = self._rows.sampling.drawn[UNIFORMS - self._uniforms_left]
        self._launched.append(_Launched(list(self._texts), drawn, event))
        self._steps_left -= 1
        self._uniforms_left -= 1

    @torch.inference_mode()
    def _launch(self, texts: Sequence[int]) -> None:
        """Launch a step of the texts that go on."""
        going = {text for text in texts if self._caches[text].length < self._engine.max_length}
        if not going:
            return
        if round_up(len(going)) < self._rows.size:
            self._move([row for row, text in enumerate(self._texts) if text in going])
        if not self._uniforms_left:
            self._send_uniforms()
        caches = [self._caches[text] if text in going else None for text in self._texts]
        self._rows.place(caches)
        self._rows.run(self._variant)
        for cache in caches:
            if cache is not None:
                cache.length += 1
        self._fetch()

    def _send_uniforms(self) -> None:
        """Send the next random numbers of each text to the GPU."""
        numbers = np.stack([self._samplers[text].uniforms(UNIFORMS) for text in self._texts])
        state = self._rows.sampling
        state.uniform[: len(numbers)] = torch.from_numpy(numbers).to(state.uniform.device)
        state.count.zero_()
        self._uniforms_left = UNIFORMS

    def _move(self, kept: list[int]) -> None:
        """Go on in a smaller batch with the texts of the rows `kept`."""
        for step in self._launched:  # somebody else may get the old rows, and draw into them
            step.event.synchronize()
            step.drawn = step.drawn.clone()
        old, new = self._rows, self._engine.take_rows(round_up(len(kept)))
        index = torch.tensor(kept, device=old.position.device)
        for name in SamplingState.MOVED:
            getattr(new.sampling, name)[: len(kept)] = getattr(old.sampling, name)[index]
        new.sampling.options.copy_(old.sampling.options)
        self._rows, self._texts = new, [self._texts[row] for row in kept]
        self._engine.give_rows(old)
