"""`LossSums` turns losses into the figures of an evaluation: loss, perplexity, accuracy, bits per byte.

All of them follow from four sums over target tokens. Sums can be added up over batches and over the ranks of a
distributed run, and the figures do not depend on how the data was divided. (A mean of means would.)

The loss is in nats per token, so it depends on the tokenizer: longer tokens are harder to predict, and there are fewer
of them. Bits per byte compares models with different tokenizers: all nats of a text, those of its end-of-text token
included, over the UTF-8 bytes of that text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from bitnet_lit.data.tokenizers import Tokenizer


@dataclass
class LossSums:
    """Holds sums over target tokens.

    Attributes:
        nats: sum of the cross-entropies.
        tokens: number of targets.
        correct: targets that had the largest logit.
        text_bytes: UTF-8 bytes of text that the targets stand for; 0 where there is no tokenizer. Of several corpora
            (`weighted`), these two are means, and `tokens` is 1.
    """

    nats: float = 0.0
    tokens: int = 0
    correct: float = 0
    text_bytes: float = 0

    def add(self, losses: Tensor, hits: Tensor, ids: Tensor, tokenizer: Tokenizer | None) -> None:
        """Add a batch.

        Args:
            losses: float32 (B * T,), the loss of each target in nats.
            hits: bool (B * T,), whether the target had the largest logit.
            ids: int64 (B, T + 1); the targets are ids[:, 1:].
        """
        if not len(ids):
            return
        # Summed in float64, so that the result does not depend on how the data was divided into batches.
        self.nats += float(losses.cpu().double().sum())
        self.tokens += losses.numel()
        self.correct += int(hits.sum())
        if tokenizer is not None:
            array = ids.cpu().numpy()
            self.text_bytes += tokenizer.text_bytes(array[:, :-1], array[:, 1:])

    def as_tensor(self) -> Tensor:
        """Return the four sums as float64 (4,), for a reduction over ranks."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    @classmethod
    def from_tensor(cls, sums: Tensor) -> LossSums:
        """Make the sums again from what `as_tensor` returned."""
        nats, tokens, correct, text_bytes = sums.tolist()
        return cls(nats, int(tokens), int(correct), int(text_bytes))

    def metrics(self) -> dict[str, float]:
        """Return loss (nats per token), perplexity, accuracy (a share), and bits_per_byte if there is text."""
        loss = self.nats / self.tokens
        metrics = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # exp(710) is no float64
            "accuracy": self.correct / self.tokens,
        }
        if self.text_bytes:
            metrics["bits_per_byte"] = self.nats / math.log(2) / self.text_bytes
        return metrics


def weighted(sums: Sequence[LossSums], shares: Sequence[float]) -> LossSums:
    """Return the sums of a text in which each corpus has its share of the tokens; a single corpus as it is.

    Args:
        shares: add up to 1. They are not looked at for a single corpus.
    """
    if len(sums) == 1:
        return sums[0]
    total = LossSums(tokens=1)
    for each, share in zip(sums, shares, strict=True):
        scale = share / each.tokens
        total.nats += each.nats * scale
        total.correct += each.correct * scale
        total.text_bytes += each.text_bytes * scale
    return total
