"""The plan of a run is computed from the lengths and sizes in the config.

It turns tokens and epochs into optimizer steps, checks that the model fits into memory, and estimates compute and
memory. `plan_table.py` prints it.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from datetime import timedelta

import torch
from lightning.fabric.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from bitnet_lit.config import CustomNetwork, ModelConfig, TrainConfig, TrainerConfig
from bitnet_lit.control_groups import memory_limit
from bitnet_lit.errors import UserError
from bitnet_lit.model.accounting import Accounting, account
from bitnet_lit.model.loss import CHUNK_ELEMENTS
from bitnet_lit.training.precision import resolved_precision, uses_cuda


def _check_nodes(num_nodes: int) -> None:
    """Refuse several nodes when nothing says where they are: the first one would wait for the others for ever."""
    if num_nodes == 1:
        return  # `detect` below starts MPI where mpi4py is installed
    known = "MASTER_ADDR" in os.environ or any(
        environment.detect()
        for environment in (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)
    )
    if not known:
        raise UserError(
            f"trainer.num_nodes={num_nodes}: nothing says where the nodes are: set MASTER_ADDR, MASTER_PORT and "
            "NODE_RANK on each of them, or start the command with torchrun or srun"
        )


def _trains_on_cpu(trainer: TrainerConfig) -> bool:
    """Return whether the run trains on the CPU, so in the machine's main memory."""
    no_gpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    return trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and no_gpu)


def world_size(trainer: TrainerConfig) -> int:
    """Return the number of processes that `trainer` asks for: devices of a node times nodes.

    Raises:
        UserError: `trainer.devices` names no device, or the nodes cannot find each other.
    """
    _check_nodes(trainer.num_nodes)
    devices = trainer.devices
    on_cpu = _trains_on_cpu(trainer)
    if on_cpu and devices and not isinstance(devices, int | str):
        raise UserError(f"trainer.devices={trainer.devices}: indices choose among GPUs; on a CPU give a number")
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if devices in ("auto", -1):
        uses_cuda = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        devices = torch.cuda.device_count() if uses_cuda else 1
    most = max(64, 4 * (os.cpu_count() or 1))  # processes on CPUs: more would only wait for each other
    if on_cpu and isinstance(devices, int) and devices > most:
        raise UserError(f"trainer.devices={devices}: more processes than {os.cpu_count()} cores can serve: take fewer")
    if isinstance(devices, int) and not isinstance(devices, bool) and devices > 0:
        return devices * trainer.num_nodes
    if devices and not isinstance(devices, str | int):
        return len(devices) * trainer.num_nodes
    raise UserError(f"trainer.devices={trainer.devices}: give a number, a list of indices, or auto")


def time_limit(max_time: str | None) -> timedelta | None:
    """Convert `trainer.max_time` (DD:HH:MM:SS) to a length of time. It counts from the first step of each process.

    Raises:
        UserError: `max_time` is not written as DD:HH:MM:SS.
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
    """Holds the lengths of a run, in optimizer steps and tokens."""

    steps: int
    """Optimizer steps of the run."""
    warmup_steps: int
    """Optimizer steps of the learning rate's warm-up."""
    schedule_steps: int
    """Optimizer steps over which the learning rate follows its curve; `schedule.total_steps`, or `steps`."""
    validation_steps: int
    """Optimizer steps between validations."""
    samples_per_step: int
    """Sequences of an optimizer step, over all devices and accumulated batches."""
    sequence_length: int
    """Tokens that a sequence predicts."""
    train_sequences: int | None
    """Sequences of an epoch; None where the data does not say."""
    accounting: Accounting
    teacher: Accounting | None = None
    """Counts of the network that teaches this one (`distill.teacher`); None where there is none."""
    validation_sequences: tuple[int, int] | None = None
    """Sequences of a validation, and of the last one, over all devices; None where the data does not say."""
    quantization_step: int = 0
    """The optimizer step from which the network is quantized; 0: from the first."""

    @property
    def flops_per_token(self) -> float:
        """FLOPs of a token in a step: the forward and backward pass, and the teacher's forward pass."""
        taught = 0.0 if self.teacher is None else self.teacher.forward_flops_per_token
        return self.accounting.training_flops_per_token + taught

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, over all devices and accumulated batches."""
        return self.samples_per_step * self.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.tokens_per_step

    def validations_before_last(self, step: int) -> int:
        """Return how many validations come after `step` and before the last step, at which the run validates too."""
        return (self.steps - 1) // self.validation_steps - min(step, self.steps - 1) // self.validation_steps

    def flops_after(self, step: int) -> float:
        """Return the FLOPs of the steps after `step` and of their validations, which take the forward pass alone."""
        part, whole = self.validation_sequences or (0, 0)
        validated = (self.validations_before_last(step) * part + whole) * self.sequence_length
        steps = (self.steps - step) * self.tokens_per_step * self.flops_per_token
        return steps + validated * self.accounting.forward_flops_per_token

    @property
    def epochs(self) -> float | None:
        """Passes over the training split; None where the data does not say how large it is."""
        if self.train_sequences is None:
            return None
        return self.steps * self.samples_per_step / self.train_sequences


def _sizes(config: TrainConfig) -> ModelConfig:
    """Return `config.model`, which must be a network of this package."""
    assert isinstance(config.model, ModelConfig), "a network of the user's own is counted when it is built"
    return config.model


def _default_interval(
    config: TrainConfig, steps: int, samples_per_step: int, validation_sequences: tuple[int, int] | None
) -> int:
    """Return the optimizer steps between validations, which divide the run evenly: into twenty parts, or into fewer.

    A validation takes no more sequences than the steps before it. It takes the forward pass alone, a third of the work
    of training, so validations take a third of the training's time at most.
    """
    limit = config.trainer.limit_val_batches
    if validation_sequences is not None:
        part = validation_sequences[0]
    else:  # it may be less, and where all is taken or a share, nobody knows
        part = limit * samples_per_step // config.trainer.accumulate_grad_batches if isinstance(limit, int) else 0
    least = max(1, math.ceil(part / samples_per_step))
    return math.ceil(steps / max(1, min(20, steps // least)))


def make_plan(
    config: TrainConfig,
    sequence_length: int,
    train_sequences: int | None,
    validation_sequences: tuple[int, int] | None = None,
    counted: Accounting | None = None,
    teacher: Accounting | None = None,
) -> Plan:
    """Compute the plan of a run, with every length that the config leaves open filled in.

    Args:
        sequence_length: tokens that a sequence predicts.
        train_sequences: sequences in the training split; None where the data does not say.
        validation_sequences: sequences of a validation, and of the last one; None where the data does not say.
        counted: the parameter counts of a network of the user's own; None computes those of `config.model`.
        teacher: the counts of the teacher; None where there is none.

    Raises:
        UserError: the lengths contradict each other, or they need the length of an epoch, which is not known.
    """
    trainer, schedule = config.trainer, config.schedule
    samples_per_step = config.data.batch_size * trainer.accumulate_grad_batches * world_size(trainer)
    tokens_per_step = samples_per_step * sequence_length
    interval = trainer.val_check_interval
    if train_sequences is None and (trainer.max_epochs is not None or isinstance(interval, float)):
        raise UserError(
            f"trainer.max_epochs={trainer.max_epochs}, trainer.val_check_interval={interval}: the data does not say "
            "how many batches an epoch has: give trainer.max_steps, and a val_check_interval in steps"
        )
    epoch_steps = (train_sequences or 0) / samples_per_step
    steps = trainer.max_steps
    if trainer.max_tokens is not None:
        steps = math.ceil(trainer.max_tokens / tokens_per_step)
    elif trainer.max_epochs is not None:
        steps = math.ceil(trainer.max_epochs * epoch_steps)
    if isinstance(interval, float):  # a share of an epoch
        interval = max(1, int(interval * epoch_steps))
    schedule_steps = schedule.total_steps or steps
    if schedule.warmup_tokens is not None:
        warmup_steps = math.ceil(schedule.warmup_tokens / tokens_per_step)
    elif schedule.warmup_steps is not None:
        warmup_steps = schedule.warmup_steps
    else:
        warmup_steps = schedule_steps // 20
    scheme = config.quant.scheme
    if config.quant.start_at and world_size(trainer) > 1 and scheme.own_tensors(1, 1):
        raise UserError(
            f"quant.start_at={config.quant.start_at}: quant={scheme.name} has parameters that get no gradient before "
            "quantization begins, and ranks wait for every gradient: take trainer.devices=1, or quant.start_at=0"
        )
    if warmup_steps > schedule_steps:
        raise UserError(
            f"schedule.warmup_steps={warmup_steps} is longer than the run ({schedule_steps} steps): shorten it"
        )
    return Plan(
        steps=steps,
        warmup_steps=warmup_steps,
        schedule_steps=schedule_steps,
        validation_steps=interval or _default_interval(config, steps, samples_per_step, validation_sequences),
        samples_per_step=samples_per_step,
        sequence_length=sequence_length,
        train_sequences=train_sequences,
        accounting=counted or account(_sizes(config), config.quant, sequence_length),
        teacher=teacher,
        validation_sequences=validation_sequences,
        quantization_step=min(math.ceil(config.quant.start_at * schedule_steps - 1e-9), schedule_steps - 1),
    )


def _machine_memory_bytes() -> float:
    """Return the bytes that this process may use: the machine's memory, or the lower limit of its control groups."""
    return min(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")), memory_limit())


def device_memory_bytes(trainer: TrainerConfig) -> float:
    """Return the bytes of memory that a device has on which `trainer` trains."""
    if uses_cuda(trainer):
        return float(torch.cuda.get_device_properties(0).total_memory)
    return _machine_memory_bytes()


def check_memory(config: TrainConfig, teacher: Accounting | None = None) -> None:
    """Refuse a model that does not fit into this machine's memory, before it is built.

    The weights are always made in main memory, and move to the device later. A run on the CPU also keeps gradients and
    optimizer states there.

    Args:
        teacher: the counts of the network that teaches this one; its weights are held beside those of the model.

    Raises:
        UserError: the model needs more than this machine has. The text gives both sizes.
    """
    model = _sizes(config)
    count = account(model, config.quant)
    on_cpu = _trains_on_cpu(config.trainer) and config.trainer.strategy != "fsdp"
    needed = count.training_bytes(1.0) if on_cpu else 4.0 * count.parameters
    beside = ""
    if teacher is not None:
        needed += 4.0 * teacher.parameters
        beside = f" beside a teacher with {teacher.parameters:,}"
    has = _machine_memory_bytes()
    if needed > has:
        raise UserError(
            f"the model has {count.parameters:,} parameters, and {'training it' if on_cpu else 'holding it'}{beside} "
            f"takes {needed / 2**30:,.0f} GiB at least; this machine has {has / 2**30:,.1f}: take smaller sizes "
            f"(model.hidden_size={model.hidden_size}, model.num_hidden_layers={model.num_hidden_layers}, "
            f"model.vocab_size={model.vocab_size})"
        )


def memory_estimate_bytes(config: TrainConfig, plan: Plan) -> float:
    """Estimate the peak memory of one device, in bytes: parameters, gradients, optimizer states, activations, logits.

    Each token keeps about 14 vectors of the hidden size and 8 of the feed-forward size per layer: inputs of norms, int8
    codes, rotated heads, gate and up. With gradient checkpointing it keeps only the input of the layer. Logits count
    three times: the values, their float32 copy, and their gradient; on CUDA only those of a chunk of rows are held
    (model/loss.py). A teacher adds its weights and its logits. Measured peaks lie within a factor of 1.5.
    """
    tokens = config.data.batch_size * plan.sequence_length
    states, model = plan.accounting.training_bytes(config.optim.STATES), config.model
    if config.trainer.strategy == "fsdp":  # parameters, gradients and optimizer states are sharded
        states /= world_size(config.trainer)
    if isinstance(model, CustomNetwork):  # the activations that it keeps for the backward pass are not known
        return states + tokens * 12 * model.vocabulary
    assert model.vocab_size is not None
    per_token_layer = 14 * model.hidden_size + 8 * model.intermediate_size
    if model.gradient_checkpointing:
        per_token_layer = 2 * model.hidden_size
    element = 4 if resolved_precision(config.trainer) == "32-true" else 2
    logits = tokens * model.vocab_size
    if uses_cuda(config.trainer) or plan.teacher is not None:
        logits = min(logits, CHUNK_ELEMENTS)
    if plan.teacher is not None:  # the activations of its forward pass are smaller than those that the student keeps
        states += element * plan.teacher.parameters + 12 * logits
    return states + tokens * model.num_hidden_layers * per_token_layer * element + 12 * logits
