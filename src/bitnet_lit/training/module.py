"""The LightningModule turns a batch into a loss, a gradient and an optimizer step. The network itself is plain PyTorch.

A resumed run must not differ from an uninterrupted one. So the learning rate, the start of quantization
(`quantization_start.py`) and the random numbers of dropout depend only on the step; dropout is seeded again for every
batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from bitnet_lit.config import CustomNetwork, TrainConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.inference.loss_sums import LossSums, weighted
from bitnet_lit.model import batch_loss, token_losses
from bitnet_lit.model.layers import joint_layers
from bitnet_lit.quant.kernels.hold import HeldWeights
from bitnet_lit.terminal import console
from bitnet_lit.training.clipping import clip_gradients, gradient_norm
from bitnet_lit.training.compile import compile_failure, undo_compile
from bitnet_lit.training.cuda_graph import GraphedStep, RecordingFailed, agreed, records_graph
from bitnet_lit.training.distillation import Distillation
from bitnet_lit.training.divergence import Divergence, check_step, skips_on_device
from bitnet_lit.training.figures import Figure
from bitnet_lit.training.optimizers import MuonAdamW, build_optimizer, restore_optimizer
from bitnet_lit.training.plan import Plan
from bitnet_lit.training.quantization_start import QUANTIZED_SINCE, QuantizationStart
from bitnet_lit.training.schedule import build_schedule

# An odd multiplier spreads (seed, batch, rank) over 63 bits. This one is splitmix64's (Steele 2014); any would do.
_MIX = 0x9E3779B97F4A7C15


class BitNetModule(L.LightningModule):
    """Trains a network that maps token ids to logits.

    A training batch is int64 (B, T + 1). A validation batch is a tuple: int64 (B, T + 1), the number of valid rows, the
    number of the corpus in `data.mix`, and whether it is of the part of the split that every validation takes. Figures
    over that part are logged, so that those of all steps can be compared. Of several corpora, val/loss is the mean by
    their weights, and val/loss_<name> is that of one.

    Args:
        model: takes int64 ids (B, T) and returns logits (B, T, V).
        tokenizer: measures bits per byte; None where the data has no tokenizer.
        moments: state of the optimizer that trained the weights of `init_from`; None starts with a new state.
        distillation: computes the training loss with a teacher; None where there is none.

    Attributes:
        step_figures: what the last optimizer step measured, by the name of the metric. Callbacks add theirs, and
            `StepLog` logs them.
        whole_figures: figures of the last validation over the whole split; empty where it took no more than the part.
        divergence: whether a step was not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        plan: Plan,
        tokenizer: Tokenizer | None,
        moments: dict[str, Any] | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        self._moments = moments
        self.model = model
        self.config = config
        self.plan = plan
        self.tokenizer = tokenizer
        self._shares: dict[str, float] = getattr(config.data, "shares", {})  # of the corpora of data.mix, by name
        self._part_sums: list[LossSums] = []  # of each corpus, over the part that every validation takes
        self._rest_sums: list[LossSums] = []  # over the other batches
        self.whole_figures: dict[str, float] = {}
        self.step_figures: dict[str, Figure] = {}
        self.distillation = distillation
        self._loss_of = partial(batch_loss if distillation is None else distillation, model)
        self._step_loss = torch.zeros(())  # mean over the accumulated batches
        self._step_parts = torch.zeros(())  # of a distillation's loss, likewise
        self.divergence = Divergence()
        self._trained: list[nn.Parameter] = []
        self._frees_gradients = False  # before the forward pass of a step
        self._graph: GraphedStep | None = None
        self._has_gradients = False  # whether the pass over the last batch was a replayed graph
        self._may_undo_compile = config.compile == "auto"  # until the first batch
        self._start = QuantizationStart(model, config.quant, plan.quantization_step)
        self._held: HeldWeights | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, and do it directly where Lightning notes which hook runs, about 40 times a step.

        PyTorch's method first asks whether the value is a parameter, a module or a buffer.
        """
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

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
        if self.distillation is not None:
            self.distillation.to(self.device, str(self.trainer.precision))
        if self.trainer.accumulate_grad_batches > 1:
            self._held = HeldWeights(joint_layers(self.model))
        hooks = {type(callback).on_before_zero_grad for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        self._frees_gradients = hooks <= {Callback.on_before_zero_grad}  # a callback with that hook may read them
        self._trained = list(self.model.parameters())  # walking through all modules takes a millisecond
        if agreed(records_graph(self.config, self.plan, self.device), self.device):
            self._stream = torch.cuda.Stream(self.device)
            self._graph = self._unrecorded()

    def _unrecorded(self) -> GraphedStep:
        mixed = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        return GraphedStep(self._loss_of, self.model, self.trainer.accumulate_grad_batches, mixed, self._stream)

    def on_train_end(self) -> None:
        # The memory of what was recorded is free for the next job of a sweep, before Python collects the trainer.
        self._graph = None
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, MuonAdamW):
                optimizer.parts[0].forget_recording()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if isinstance(self.config.model, CustomNetwork) or self.config.model.dropout:
            counter = (batch_idx * self.trainer.world_size + self.global_rank) * 1_000_003 + self.config.seed
            torch.manual_seed(counter * _MIX % 2**63)
        if self._start.begin(self.global_step):
            if self._graph is not None:
                self._graph = self._unrecorded()  # the pass is another one from here on
            self._note(f"step {self.global_step}: the network is quantized from here on")

    def on_validation_start(self) -> None:
        self._start.quantize()  # validation measures the model that is shipped, which is fully quantized

    def on_validation_end(self) -> None:
        self._start.go_on()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.plan.quantization_step:
            checkpoint[QUANTIZED_SINCE] = None if self.global_step <= self._start.step else self._start.step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        since = checkpoint.get(QUANTIZED_SINCE, 0)
        if since is not None:
            self._start.step = since

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean next-token loss of the batch in nats per token, with a teacher the loss of distillation."""
        is_first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if self._held is not None and is_first:
            self._held.round(torch.bfloat16 if self.trainer.precision.startswith("bf16") else torch.float32)
        is_last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if is_first and self._frees_gradients:
            for parameter in self._trained:
                parameter.grad = None  # Lightning does it after the forward pass, whose activations lie beside them
        replayed = self._replayed(batch, is_first, is_last)
        self._has_gradients = replayed is not None
        loss = self._loss(batch) if replayed is None else replayed
        self._batch = batch
        part = loss.detach() / self.trainer.accumulate_grad_batches
        self._step_loss = part if is_first else self._step_loss + part
        if self.distillation is not None:
            parts = self.distillation.parts / self.trainer.accumulate_grad_batches
            self._step_parts = parts if is_first else self._step_parts + parts
        return loss

    def _replayed(self, batch: Tensor, is_first: bool, is_last: bool) -> Tensor | None:
        """Return the loss of a batch whose pass was replayed, or None where it must be computed."""
        if self._graph is None or self._start.strength is not None or not self._graph.is_due(batch, is_first):
            return None
        try:
            return self._graph(batch, is_first, is_last)
        except RecordingFailed as error:
            if self.config.cuda_graph == "true":
                raise UserError(
                    f"cuda_graph=true: the pass cannot be recorded: {error}: cuda_graph=auto goes on without"
                ) from None
            self._graph = None
            self.zero_grad(set_to_none=True)
            self._note(f"no CUDA graph, so steps are slower: {error}")
            return None

    def _note(self, text: str) -> None:
        if self.trainer.is_global_zero:
            console(stderr=True).print(f"note: {text}", markup=False)

    def _loss(self, batch: Tensor) -> Tensor:
        """Return the loss of a batch. Where compile=auto and compiling fails, go on without it."""
        if not self._may_undo_compile:
            return self._loss_of(batch)
        self._may_undo_compile = False
        try:
            return self._loss_of(batch)
        except Exception as error:
            if (why := compile_failure(error)) is None:
                raise
            undo_compile(self.model)
            if self.distillation is not None:
                self.distillation.undo_compile()
            self._note(f"not compiled, so steps are slower: {why}")
            return self._loss_of(batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients, unless a replayed graph has done it."""
        if not self._has_gradients:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradients of the last step. A graph keeps their memory, and has set them to zero."""
        if not self._has_gradients:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.release_weights()

    def release_weights(self) -> None:
        """Let layers round their weights at each pass again. A run that ends between two batches of a step needs it."""
        if self._held is not None:
            self._held.release()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient, and note the figures of the step. Lightning calls this once per optimizer step.

        Raises:
            Diverged: the norm of the gradient is not finite (divergence.py says when that is noticed).
        """
        limit = self.config.trainer.gradient_clip_val or float("inf")
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        norm = gradient_norm(gradients)
        if self.device.type == "cuda" and skips_on_device(optimizer):
            self.divergence.note(self.global_step, self._step_loss, norm, self._batch)
            optimizer.found_inf = self.divergence.found_inf  # type: ignore[attr-defined]
        else:
            check_step(self.model, self.global_step, self._step_loss, norm, self._batch)
        if isinstance(optimizer, MuonAdamW):
            optimizer.gradients_stay = self._has_gradients  # a replayed pass has written them
        # This comes after the check, because a norm that is not finite would make every gradient 0 or NaN.
        clip_gradients(gradients, norm, limit)
        rate = torch.tensor(optimizer.param_groups[0]["lr"])
        figures: dict[str, Any] = {"train/loss": self._step_loss, "train/grad_norm": norm, "train/learning_rate": rate}
        if self.distillation is not None:
            figures |= self.distillation.figures(self._step_parts)
        self.trainer.callback_metrics.update(figures)  # for callbacks of the user's own
        self.step_figures = {**figures}

    def check_finite(self) -> None:
        """Wait for the device, and make sure that the weights are those of steps with finite gradients.

        Raises:
            Diverged: a step was not finite. The weights are those before it.
        """
        self.divergence.check(self.model, self._loss_of)

    def on_validation_epoch_start(self) -> None:
        self._part_sums, self._rest_sums = ([LossSums() for _ in self._shares or [""]] for _ in range(2))

    def validation_step(self, batch: tuple[Tensor, int, int, bool], batch_idx: int) -> None:
        """Add the valid rows of a batch to the sums. The other rows only give every rank the same number of batches."""
        ids, num_valid, corpus, in_part = batch
        losses, hits = token_losses(self.model, ids)
        num_tokens = num_valid * (ids.shape[1] - 1)
        sums = self._part_sums if in_part else self._rest_sums
        sums[corpus].add(losses[:num_tokens], hits[:num_tokens], ids[:num_valid], self.tokenizer)

    def on_validation_epoch_end(self) -> None:
        sums = torch.stack([each.as_tensor() for each in self._part_sums + self._rest_sums])
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        part, rest = sums.chunk(2)
        for name, value in self._validation_figures(part).items():
            self.log(name, value, rank_zero_only=False)
        whole = self._validation_figures(part + rest) if rest.any() else {}
        # In float32, as Lightning keeps what is logged: equal models have equal figures, whatever the part is.
        self.whole_figures = {name: torch.tensor(value, dtype=torch.float32).item() for name, value in whole.items()}
        for name, value in self.whole_figures.items():
            self.log(name.replace("val/", "val_whole_split/", 1), value, rank_zero_only=False)

    def _validation_figures(self, rows: Tensor) -> dict[str, float]:
        """Return the figures of a validation from the four sums of each corpus, (corpora, 4), by their logged names."""
        sums = [LossSums.from_tensor(row) for row in rows]
        figures = weighted(sums, list(self._shares.values())).metrics()
        for corpus, each in zip(self._shares, sums, strict=False):
            figures |= {f"{name}_{corpus}": value for name, value in each.metrics().items()}
        return {f"val/{name}": value for name, value in figures.items()}
