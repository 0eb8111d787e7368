"""This project adds its own classes to bitnet-lit: a few lines for each open slot. The package itself is not changed.

`conf/` gives each class a name, so that `--config-dir conf data=sums optim=sgd ...` finds it. README.md has the
commands.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import lightning as L
import sentencepiece
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bitnet_lit.quant import Scheme
from bitnet_lit.quant.weights import Granularity, PerTensor, WeightRule


class CountTokens(L.Callback):
    """This callback logs the number of tokens so far. Checkpoints store it, so a resumed run goes on counting."""

    def __init__(self) -> None:
        self.tokens = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.tokens += batch[:, 1:].numel()
        pl_module.log("train/tokens", float(self.tokens))

    def state_dict(self) -> dict:
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict) -> None:
        self.tokens = state_dict["tokens"]


class Sums(L.LightningDataModule):
    """This data module has additions such as "12 + 7 = 19". Each character is a token. A quarter is for validation.

    Args:
        batch_size, sequence_length: set by the run.
        largest: the largest number that is added.
        folder: the folder in which the tokenizer is written.
    """

    def __init__(self, batch_size: int, sequence_length: int, largest: int = 50, folder: str = "data/sums") -> None:
        super().__init__()
        self.batch_size, self.sequence_length, self.folder = batch_size, sequence_length, Path(folder)
        numbers = range(largest + 1)
        self.lines = [f"{a} + {b} = {a + b}" for a in numbers for b in numbers]
        self.tokenizer_path = self.folder / "tokenizer.model"

    def prepare_data(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(self.lines),
            model_prefix=str(self.tokenizer_path.with_suffix("")),
            model_type="char",
            vocab_size=17,  # the characters, and three special tokens of SentencePiece
            hard_vocab_limit=False,
            minloglevel=2,
        )

    def setup(self, stage: str) -> None:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(self.tokenizer_path))
        self.vocab_size = tokenizer.vocab_size()
        order = torch.randperm(len(self.lines), generator=torch.Generator().manual_seed(0)).tolist()
        self.parts = []
        for places in ([i for i in order if i % 4], [i for i in order if i % 4 == 0]):
            ids = [token for i in places for token in [tokenizer.bos_id(), *tokenizer.encode(self.lines[i])]]
            length = self.sequence_length
            rows = range((len(ids) - 1) // length)
            self.parts.append(torch.tensor([ids[row * length : (row + 1) * length + 1] for row in rows]))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[0], batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[1], batch_size=self.batch_size)


class Mixer(nn.Module):
    """In this network each token sees the mean of all tokens so far. `up` and `down` are quantized, `lm_head` is not.

    Args:
        vocab_size: set by the run.
        width: size of the hidden vectors.
    """

    def __init__(self, vocab_size: int, width: int = 64) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (B, T, V) for ids, int64 (B, T)."""
        x = self.embed_tokens(ids)
        x = x + x.cumsum(1) / torch.arange(1, ids.shape[1] + 1, device=ids.device)[:, None]
        return self.lm_head(x + self.down(self.up(self.norm(x)).relu()))


def inverse_sqrt(step: int, warmup_steps: int) -> float:
    """Return the learning rate as a factor of its peak: a linear warm-up, then 1 / sqrt(step) (arXiv 1706.03762)."""
    return min((step + 1) / max(1, warmup_steps), (max(1, warmup_steps) / (step + 1)) ** 0.5)


@dataclass(frozen=True)
class ThresholdRule(WeightRule):
    """This is the rule of Ternary Weight Networks (arXiv 1605.04711).

    A weight becomes 0 if its magnitude is at most `factor` times the mean magnitude.
    """

    factor: float

    levels = (-1, 0, 1)

    @property
    def granularity(self) -> Granularity:
        return PerTensor()

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes in the shape of the weight, and one scale: weight ~= codes * scale."""
        weight = weight.float()
        codes = weight.sign() * (weight.abs() > self.factor * weight.abs().mean())
        return codes, (weight * codes).sum() / codes.abs().sum().clamp(min=1) + 1e-5


@dataclass(frozen=True)
class Threshold(Scheme):
    """This quantization scheme has a rule for weights. Activations are rounded to 8 bits, the default of a scheme."""

    name = "threshold"
    title = "ternary weights by a threshold"
    factor: float = 0.7

    @property
    def weights(self) -> WeightRule:
        return ThresholdRule(self.factor)
