"""The plan of a run: what the lengths and sizes in the config come to, printed before the first step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from bitnet_lit.config import TrainConfig, TrainerConfig
from bitnet_lit.errors import UserError
from bitnet_lit.model.accounting import Accounting, account
from bitnet_lit.terminal import console


def world_size(trainer: TrainerConfig) -> int:
    """Processes that `trainer` asks for: devices of a node times nodes."""
    devices = trainer.devices
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if devices in ("auto", -1):
        uses_cuda = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        devices = torch.cuda.device_count() if uses_cuda else 1
    if isinstance(devices, int) and devices > 0:
        return devices * trainer.num_nodes
    if not isinstance(devices, str | int) and len(devices):
        return len(devices) * trainer.num_nodes
    raise UserError(f"trainer.devices={trainer.devices}: give a number, a list of indices, or auto")


def time_limit(max_time: str | None) -> timedelta | None:
    """trainer.max_time, DD:HH:MM:SS, as a length of time; it counts from the first step of each process.

    Raises:
        UserError: written otherwise.
    """
    if max_time is None:
        return None
    parts = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", max_time.strip(), re.ASCII)
    if parts is None:
        raise UserError(f"trainer.max_time={max_time}: write it as DD:HH:MM:SS, five minutes as 00:00:05:00")
    days, hours, minutes, seconds = (int(part) for part in parts.groups())
    return timedelta(days=min(days, 10**6), hours=hours, minutes=minutes, seconds=seconds)


@dataclass(frozen=True)
class Plan:
    """Lengths in optimizer steps and tokens."""

    steps: int
    warmup_steps: int
    schedule_steps: int
    """The length the learning rate's curve is drawn for."""
    validation_steps: int
    """Optimizer steps between validations."""
    samples_per_step: int
    sequence_length: int
    train_sequences: int
    accounting: Accounting

    @property
    def tokens_per_step(self) -> int:
        """Over all devices."""
        return self.samples_per_step * self.sequence_length

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.steps * self.tokens_per_step

    @property
    def epochs(self) -> float:
        """Passes over the training split."""
        return self.steps * self.samples_per_step / self.train_sequences


def make_plan(config: TrainConfig, sequence_length: int, train_sequences: int) -> Plan:
    """Fill in every length that the config leaves open.

    Args:
        sequence_length: tokens a sequence predicts.
        train_sequences: sequences in the training split.
    """
    trainer, schedule = config.trainer, config.schedule
    samples_per_step = config.data.batch_size * trainer.accumulate_grad_batches * world_size(trainer)
    tokens_per_step = samples_per_step * sequence_length
    steps = math.ceil(trainer.max_tokens / tokens_per_step) if trainer.max_tokens else trainer.max_steps
    schedule_steps = schedule.total_steps or steps
    if schedule.warmup_tokens is not None:
        warmup_steps = math.ceil(schedule.warmup_tokens / tokens_per_step)
    elif schedule.warmup_steps is not None:
        warmup_steps = schedule.warmup_steps
    else:
        warmup_steps = schedule_steps // 20
    if warmup_steps > schedule_steps:
        raise UserError(
            f"schedule.warmup_steps={warmup_steps} is longer than the run ({schedule_steps} steps): shorten it"
        )
    return Plan(
        steps=steps,
        warmup_steps=warmup_steps,
        schedule_steps=schedule_steps,
        validation_steps=trainer.val_check_interval or max(1, steps // 20),
        samples_per_step=samples_per_step,
        sequence_length=sequence_length,
        train_sequences=train_sequences,
        accounting=account(config.model, config.quant, sequence_length),
    )


def memory_estimate_bytes(config: TrainConfig, plan: Plan) -> float:
    """Peak bytes of one device, roughly: parameters with optimizer states, activations, logits.

    Activations per token and layer: about 14 hidden and 8 feed-forward vectors in float32 (inputs of norms, int8
    codes, rotated heads, gate and up); with gradient checkpointing only the layer's input. Logits count three times
    (values, their float32 copy, their gradient). Measured peaks lie within a factor of 1.5.
    """
    model = config.model
    assert model.vocab_size is not None
    states = 2.0 if config.optim.name == "adamw" else 1.3
    per_token_layer = 14 * model.hidden_size + 8 * model.intermediate_size
    if model.gradient_checkpointing:
        per_token_layer = 2 * model.hidden_size
    tokens = config.data.batch_size * plan.sequence_length
    element = 4 if config.trainer.precision == "32-true" else 2
    activations = tokens * (model.num_hidden_layers * per_token_layer * element + 12 * model.vocab_size)
    return plan.accounting.training_bytes(states) + activations


def print_plan(config: TrainConfig, plan: Plan, facts: dict[str, Any]) -> None:
    """A table of the run on the terminal; `facts` are rows to put first (data, device, folder)."""
    count = plan.accounting
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows: dict[str, Any] = {
        **facts,
        "model": f"{config.model.name}, {config.quant.name}: {count.parameters:,} parameters "
        f"({count.projections:,} in projections, {count.embedding:,} in embeddings)",
        "steps": f"{plan.steps:,} of {plan.tokens_per_step:,} tokens "
        f"({config.data.batch_size} x {plan.sequence_length} x "
        f"{plan.samples_per_step // config.data.batch_size} batches)",
        "tokens": f"{plan.tokens:,} in all, {plan.epochs:.2f} epochs of {plan.train_sequences:,} sequences",
        "optimizer": f"{config.optim.name}, peak {config.optim.learning_rate:g}, {config.schedule.name} over "
        f"{plan.schedule_steps:,} steps, {plan.warmup_steps:,} of them warm-up",
        "validation": f"every {plan.validation_steps:,} steps",
        "compute": f"{count.training_flops_per_token * plan.tokens / 1e12:,.1f} TFLOP",
        "memory": f"about {memory_estimate_bytes(config, plan) / 2**30:.2f} GiB a device",
    }
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), str(value))
    console(stderr=True).print(table)
