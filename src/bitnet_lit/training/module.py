"""The LightningModule turns a batch into a loss, a gradient and an optimizer step. The network itself is plain PyTorch.

A resumed run must not differ from an uninterrupted one. So the learning rate, the warm-up of the quantization and the
random numbers of dropout depend only on the step; dropout is seeded again for every batch.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from bitnet_lit.config import CustomNetwork, TrainConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import Diverged
from bitnet_lit.inference.loss_sums import LossSums
from bitnet_lit.model import next_token_loss
from bitnet_lit.quant.bit_linear import set_strength
from bitnet_lit.training.diagnose import first_nonfinite_output, largest_gradient, last_nonfinite_gradient
from bitnet_lit.training.optimizers import build_optimizer, restore_optimizer
from bitnet_lit.training.plan import Plan
from bitnet_lit.training.schedule import build_schedule

# An odd multiplier spreads (seed, batch, rank) over 63 bits. This one is splitmix64's (Steele 2014); any would do.
_MIX = 0x9E3779B97F4A7C15


def warmup_strength(shape: str, progress: float) -> float:
    """Return lambda, from 0 (full precision) to 1 (fully quantized).

    Args:
        shape: "linear", "cosine" or "exponential" (`quant.lambda_warmup_shape`).
        progress: the share of the warm-up that is done, in [0, 1].
    """
    if shape == "cosine":
        return (1 - math.cos(math.pi * progress)) / 2
    if shape == "exponential":  # It rises fast at first, then slowly.
        return (1 - math.exp(-5 * progress)) / (1 - math.exp(-5))
    return progress


class BitNetModule(L.LightningModule):
    """Trains a network that maps token ids to logits.

    A training batch is int64 (B, T + 1). A validation batch is a pair: int64 (B, T + 1), and the number of valid rows.

    Args:
        model: takes int64 ids (B, T) and returns logits (B, T, V).
        tokenizer: measures bits per byte; None where the data has no tokenizer.
        moments: state of the optimizer that trained the weights of `init_from`; None starts with a new state.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        plan: Plan,
        tokenizer: Tokenizer | None,
        moments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._moments = moments
        self.model = model
        self.config = config
        self.plan = plan
        self.tokenizer = tokenizer
        self.validation_sums = LossSums()
        self._step_loss = torch.zeros(())  # mean over the accumulated batches
        self._strength: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) of int64 ids (B, T)."""
        return self.model(ids)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and its schedule, which is stepped once per optimizer step."""
        optimizer = build_optimizer(self.model, self.config.optim)
        if self._moments is not None:
            restore_optimizer(optimizer, self._moments)
            self._moments = None
        schedule = build_schedule(optimizer, self.config.schedule, self.plan.warmup_steps, self.plan.schedule_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        if self.config.quant.lambda_warmup_steps > self.global_step:
            self._strength = torch.zeros((), device=self.device)
            set_strength(self.model, self._strength)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if isinstance(self.config.model, CustomNetwork) or self.config.model.dropout:
            counter = (batch_idx * self.trainer.world_size + self.global_rank) * 1_000_003 + self.config.seed
            torch.manual_seed(counter * _MIX % 2**63)
        if self._strength is not None:
            progress = self.global_step / self.config.quant.lambda_warmup_steps
            if progress < 1:
                self._strength.fill_(warmup_strength(self.config.quant.lambda_warmup_shape, progress))
            else:
                self._strength = None
                set_strength(self.model, None)

    def on_validation_start(self) -> None:
        set_strength(self.model, None)  # validation measures the model that is shipped, which is fully quantized

    def on_validation_end(self) -> None:
        set_strength(self.model, self._strength)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean next-token loss of the batch, in nats per token."""
        loss = next_token_loss(self.model(batch[:, :-1]), batch[:, 1:])
        self._batch = batch
        self._step_loss = self._step_loss.to(self.device) + loss.detach() / self.trainer.accumulate_grad_batches
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient and log it. Lightning calls this once per optimizer step.

        Raises:
            Diverged: the norm of the gradient is not finite.
        """
        limit = self.config.trainer.gradient_clip_val or float("inf")
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, FullyShardedDataParallel):  # FSDP sums the norm over the shards, and clips at once
            norm = wrapped.clip_grad_norm_(limit)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            self._stop_diverged(norm)
        if not isinstance(wrapped, FullyShardedDataParallel):
            # This comes after the check, because a norm that is not finite would make every gradient 0 or NaN.
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        self.log("train/loss", self._step_loss, sync_dist=True)
        self.log("train/grad_norm", norm)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        self._step_loss = torch.zeros(())

    def _stop_diverged(self, norm: Tensor) -> None:
        if layer := first_nonfinite_output(self.model, self._batch[:, :-1]):
            what = f"the output of {layer} is not finite"
        elif parameter := last_nonfinite_gradient(self.model):
            what = f"the gradient of {parameter} is not finite"
        else:  # every gradient is finite, but the sum of their squares overflows
            what = f"the norm of the gradient is not finite (the largest is that of {largest_gradient(self.model)})"
        raise Diverged(
            f"step {self.global_step}: {what} (loss {float(self._step_loss):.4g}, gradient norm {float(norm):.4g}): "
            "lower optim.learning_rate"
        )

    def on_validation_epoch_start(self) -> None:
        self.validation_sums = LossSums()

    def validation_step(self, batch: tuple[Tensor, int], batch_idx: int) -> None:
        """Add the valid rows of a batch to the sums. The other rows only give every rank the same number of batches."""
        ids, num_valid = batch
        logits = self.model(ids[:, :-1])
        self.validation_sums.add(logits[:num_valid], ids[:num_valid], self.tokenizer)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            sums = self.validation_sums.as_tensor().to(self.device)
            self.validation_sums = LossSums.from_tensor(self.trainer.strategy.reduce(sums, reduce_op="sum"))
        for name, value in self.validation_sums.metrics().items():
            self.log(f"val/{name}", value, rank_zero_only=False)
