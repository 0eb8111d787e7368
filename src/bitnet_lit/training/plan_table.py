"""The plan of a run is printed as a table before the first step."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from bitnet_lit.config import ModelConfig, TrainConfig
from bitnet_lit.quant.scheme import is_skipped
from bitnet_lit.terminal import console
from bitnet_lit.training.plan import Plan, memory_estimate_bytes


def _teacher_share(plan: Plan) -> float:
    return 1 - plan.accounting.training_flops_per_token / plan.flops_per_token


def _validation_row(plan: Plan) -> str:
    """Return when the run validates and on how many tokens, and the remedy where validations outweigh the training."""
    is_only_last = plan.validation_steps >= plan.steps
    every = "every step" if plan.validation_steps == 1 else f"every {plan.validation_steps:,} steps"
    row = "at the end" if is_only_last else every
    tokens, last = (sequences * plan.sequence_length for sequences in plan.validation_sequences or (0, 0))
    if last and is_only_last:
        row += f", on {last:,} tokens"
    elif last:
        row += f", on {tokens:,} tokens" + (f", at the end on {last:,}" if last > tokens else "")
        # A token of a validation needs the forward pass alone, a third of the work of a token in training.
        shares = tokens / 3 / (plan.validation_steps * plan.tokens_per_step)
        if shares >= 1.5:
            row += (
                f", about {shares:,.0f} times the work of the steps between: trainer.limit_val_batches=<batches> or a "
                "larger trainer.val_check_interval=<steps> shortens the run"
            )
    return row + (", of the quantized network in every phase" if plan.quantization_step else "")


def print_plan(config: TrainConfig, plan: Plan, facts: dict[str, Any]) -> None:
    """Print a table of the run on the terminal.

    Args:
        facts: the first rows: run folder, data, device.
    """
    count = plan.accounting
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows: dict[str, Any] = {
        **facts,
        "model": f"{config.model.name}, {config.quant.name}: {count.parameters:,} parameters "
        f"({count.projections:,} in projections, {count.embedding:,} in embeddings)",
        "weights": f"{config.quant.scheme.title}; {count.bits_per_weight:.2f} bits a projection weight, scales counted",
        "steps": f"{plan.steps:,} of {plan.tokens_per_step:,} tokens "
        f"({config.data.batch_size} x {plan.sequence_length} x "
        f"{plan.samples_per_step // config.data.batch_size} batches)",
        "tokens": f"{plan.tokens:,} in all"
        + ("" if plan.epochs is None else f", {plan.epochs:.2f} epochs of {plan.train_sequences:,} sequences"),
        "optimizer": f"{config.optim.name}, peak {config.optim.learning_rate:g}, {config.schedule.name} over "
        f"{plan.schedule_steps:,} steps, {plan.warmup_steps:,} of them warm-up",
        "validation": _validation_row(plan),
        "compute": f"{plan.flops_per_token * plan.tokens / 1e12:,.1f} TFLOP"
        + ("" if plan.teacher is None else f", {_teacher_share(plan):.0%} of them in the teacher's forward pass"),
        "memory": f"about {memory_estimate_bytes(config, plan) / 2**30:.2f} GiB a device",
    }
    if plan.teacher is not None:
        rows["teacher"] = f"{config.distill.teacher}: {plan.teacher.parameters:,} parameters, on every device"
    if plan.quantization_step:
        reached = "" if plan.quantization_step < plan.steps else ", which this run does not reach"
        rows["quantized"] = f"from step {plan.quantization_step:,} on{reached}; before that in full precision"
    if warmup := config.quant.lambda_warmup_steps:
        end, shape = plan.quantization_step + warmup, config.quant.lambda_warmup_shape
        reached = "" if end < plan.steps else ", which this run does not reach"
        over = f"{warmup:,} step{'s' * (warmup > 1)}"
        rows["lambda"] = f"rises from 0 to 1 ({shape}) over {over}: fully quantized from step {end:,} on{reached}"
    rounds_head = config.quant.scheme.quantizes and not is_skipped("lm_head", config.quant.skip)
    if rounds_head and isinstance(config.model, ModelConfig):
        rows["lm_head"] = f"rounded too: add it to quant.skip={list(config.quant.skip)} to leave it dense"
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), str(value))
    console(stderr=True).print(table)
