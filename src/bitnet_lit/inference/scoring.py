"""How likely a model finds given tokens: their losses, wherever in a text they stand.

Perplexity of a text and the answers of multiple choice come down to this. A `Window` is token ids of which the last
ones are scored, each from all tokens before it. The literal way to score one is

    log_probabilities = log_softmax(model(ids[:-1]))           # a row for each token that is read
    losses = [-log_probabilities[i - 1, ids[i]] for i in range(start, len(ids))]

Windows of one task have much in common: the choices of a question share the question. A token is read once for all
windows that begin alike, as far as that is cheap:

- `NetworkScorer` runs batches on any device. A window whose tokens are the beginning of another's is not run at all:
  the other's row has its results.
- `NativeScorer` runs the native engine on texts in alphabetical order. What a text shares with the one before it is in
  the cache already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bitnet_lit.inference.engines.cpu.engine import NativeModel

LOGITS_AT_ONCE = 2**25
"""Elements of the logits that the native engine returns in one step: 128 MiB."""


@dataclass(frozen=True)
class Window:
    """Holds tokens to read and tokens to score.

    Attributes:
        ids: token ids.
        start: the first token that is scored, 1 or more. From `len(ids)` on there is none.
    """

    ids: Sequence[int]
    start: int


@dataclass(frozen=True)
class Scores:
    """Holds what a model says of the scored tokens of a window.

    Attributes:
        losses: nats, float32 (number of scored tokens,).
        hits: whether the token had the largest logit, bool of the same shape.
    """

    losses: NDArray[np.float32]
    hits: NDArray[np.bool_]


@dataclass
class Row:
    """A Row is tokens to run, and the windows that find their results there.

    Attributes:
        ids: the tokens that are read.
        windows: numbers of the windows.
        first: the first position whose logits are needed.
    """

    ids: Sequence[int]
    windows: list[int] = field(default_factory=list)
    first: int = 0


def plan_rows(windows: Sequence[Window]) -> list[Row]:
    """Return the rows to run for windows, in alphabetical order: no row is the beginning of another."""
    numbers = [number for number, window in enumerate(windows) if window.start < len(window.ids)]
    inputs = {number: list(windows[number].ids[:-1]) for number in numbers}
    rows: list[Row] = []
    for number in sorted(numbers, key=inputs.__getitem__, reverse=True):
        ids, first = inputs[number], windows[number].start - 1
        if not rows or list(rows[-1].ids[: len(ids)]) != ids:
            rows.append(Row(ids, first=first))
        rows[-1].windows.append(number)
        rows[-1].first = min(rows[-1].first, first)
    return rows[::-1]


class Scorer(ABC):
    """Scores windows with a model.

    Attributes:
        max_length: the most tokens that can be read: a window has one more at most.
    """

    max_length: int

    @abstractmethod
    def run(self, rows: Sequence[Row], windows: Sequence[Window]) -> Iterator[tuple[int, Scores]]:
        """Yield the number and the scores of every window of `rows`, in any order."""

    def score(self, windows: Sequence[Window]) -> list[Scores]:
        """Return the scores of windows, in their order.

        Raises:
            ModelError: a loss is NaN, or memory ends.
        """
        scores = dict(self.found(windows))
        return [scores[number] for number in range(len(windows))]

    def found(self, windows: Sequence[Window]) -> Iterator[tuple[int, Scores]]:
        """Yield the number and the scores of each window as soon as they are known, in any order.

        Raises:
            ModelError: a loss is NaN, or memory ends.
        """
        for number, window in enumerate(windows):
            if window.start >= len(window.ids):
                yield number, Scores(np.empty(0, np.float32), np.empty(0, np.bool_))
        for number, scores in self.run(plan_rows(windows), windows):
            if np.isnan(scores.losses).any():
                raise ModelError("the model computes no numbers: a loss is NaN: train it again")
            yield number, scores


class NetworkScorer(Scorer):
    """Scores with a PyTorch network.

    Args:
        model: a `CausalLM`, or any module of ids (B, T) -> logits (B, T, V) in which later tokens do not change what is
            computed of earlier ones. It is in evaluation mode.
        max_length: the context of the network.
        batch_size: rows that run together.
        dtype: autocast's dtype for matrix products; None: that of the weights.
    """

    def __init__(
        self, model: nn.Module, max_length: int, batch_size: int = 32, dtype: torch.dtype | None = None
    ) -> None:
        self._model, self.max_length, self._batch_size, self._dtype = model, max_length, batch_size, dtype
        self._device = next(model.parameters()).device

    def run(self, rows: Sequence[Row], windows: Sequence[Window]) -> Iterator[tuple[int, Scores]]:
        """See `Scorer`. Rows of about one length run together, so that little of a batch is padding."""
        waiting = iter(sorted(rows, key=lambda row: -len(row.ids)))
        while batch := list(islice(waiting, self._batch_size)):
            yield from self._run_batch(batch, windows)

    def _run_batch(self, rows: Sequence[Row], windows: Sequence[Window]) -> Iterator[tuple[int, Scores]]:
        import torch

        ids = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.int64)
        at: list[tuple[int, int]] = []  # the row and position behind which each scored token stands
        targets: list[int] = []
        numbers: list[tuple[int, int]] = []  # windows, and how many tokens they score
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = torch.tensor(row.ids)
            for number in row.windows:
                window = windows[number]
                at += [(index, position - 1) for position in range(window.start, len(window.ids))]
                targets += window.ids[window.start :]
                numbers.append((number, len(window.ids) - window.start))
        where = torch.tensor(at).T.to(self._device)
        autocast = nullcontext() if self._dtype is None else torch.autocast(self._device.type, self._dtype)
        with torch.inference_mode(), autocast:
            losses, hits = self._losses(ids.to(self._device), where, torch.tensor(targets).to(self._device))
        every_loss, every_hit = losses.float().cpu().numpy(), hits.cpu().numpy()
        end = 0
        for number, count in numbers:
            begin, end = end, end + count
            yield number, Scores(every_loss[begin:end], every_hit[begin:end])

    def _losses(
        self, ids: torch.Tensor, where: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return loss and hit of each target (N,), from the logits at where, int64 (2, N), of ids (B, T)."""
        from torch import nn

        from bitnet_lit.model import CausalLM
        from bitnet_lit.model.loss import TokenLosses, linear_token_losses

        if isinstance(self._model, CausalLM) and type(self._model.lm_head) is nn.Linear:
            hidden = self._model.model(ids)[where[0], where[1]]
            return linear_token_losses(hidden, self._model.lm_head.weight, targets)
        losses: tuple[torch.Tensor, torch.Tensor] = TokenLosses()(self._model(ids)[where[0], where[1]], targets)
        return losses


class NativeScorer(Scorer):
    """Scores with the native engine, one row after the other."""

    def __init__(self, model: NativeModel) -> None:
        from bitnet_lit.inference.engines.cpu.engine import MAX_STEP_TOKENS

        self._model, self.max_length = model, model.config.max_position_embeddings
        self._step_tokens = max(1, min(MAX_STEP_TOKENS, LOGITS_AT_ONCE // model.config.vocabulary))

    def run(self, rows: Sequence[Row], windows: Sequence[Window]) -> Iterator[tuple[int, Scores]]:
        """See `Scorer`."""
        from bitnet_lit.inference.engines import check_step

        cache, before = self._model.new_cache(), Row([])
        for row in rows:
            check_step([row.ids], [0], self._model.config.vocabulary, self.max_length)
            # The logits of a position that is kept were computed for another row and are gone.
            kept = min(_common(before.ids, row.ids), row.first)
            cache.truncate(kept)
            losses = {number: np.empty(len(windows[number].ids) - windows[number].start) for number in row.windows}
            hits = {number: np.empty(len(losses[number]), np.bool_) for number in row.windows}
            for begin in range(kept, len(row.ids), self._step_tokens):
                end = min(begin + self._step_tokens, len(row.ids))
                first = max(begin, row.first)
                wanted = range(first - begin, max(first, end) - begin)
                logits = self._model.step(row.ids[begin:end], [cache] * (end - begin), wanted)
                if not len(wanted):
                    continue
                log_sums, best = _log_sum_exp(logits), logits.argmax(axis=1)
                for number in row.windows:
                    window = windows[number]
                    # Logits at position i are those of token i + 1.
                    tokens = np.arange(max(window.start, first + 1), min(len(window.ids), end + 1))
                    targets = np.asarray(window.ids[tokens[0] : tokens[-1] + 1] if len(tokens) else [], dtype=np.int64)
                    places = tokens - 1 - first
                    losses[number][tokens - window.start] = log_sums[places] - logits[places, targets]
                    hits[number][tokens - window.start] = best[places] == targets
            before = row
            for number in row.windows:
                yield number, Scores(losses[number].astype(np.float32), hits[number])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts have in common at their beginning."""
    length = min(len(a), len(b))
    differs = np.asarray(a[:length]) != np.asarray(b[:length])
    return int(differs.argmax()) if differs.any() else length


def _log_sum_exp(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return log(sum(exp(logits))) of each row of (N, V), float64 (N,)."""
    highest = logits.max(axis=1, keepdims=True)
    sums = np.exp(logits - highest).sum(axis=1, dtype=np.float64)
    return np.asarray(np.log(sums) + highest[:, 0])
