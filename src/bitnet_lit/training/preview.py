"""`sweep.dry_run=true` checks a run or every job of a sweep without training, and prints what each would take.

It opens the data, fills in the sizes, builds the network where it takes no memory, makes the optimizer and the
schedule, and compares a half-done job with its checkpoint: what a run does before its first step. Nothing is written
but shards of a remote folder, which come to its cache.

The time comes from the speed of jobs of the sweep that are done: FLOPs in a second, of the same kind of weights where
there are such jobs. Where none is done, it comes from the speed of a matrix product on this machine, of which training
is assumed to reach `TYPICAL_SHARE`. That is a rough figure: the right one is within a factor of about three. Several
GPUs are taken to be so many times as fast as one. The time is that of steps and validations (of a data module of the
user's own, whose validations have no known size, that of the steps). Start-up, sample texts and export come on top, and
take most of the time of a job of a minute.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from bitnet_lit.config import DataConfig, ModelConfig, PrepareConfig, TrainConfig, TrainerConfig
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.shard_folder import is_complete
from bitnet_lit.errors import MESSAGES, TrainingStopped, UserError, is_out_of_memory, one_line, without_class_name
from bitnet_lit.exports.targets import check_targets
from bitnet_lit.files.foreign_json import read_json
from bitnet_lit.files.json_shapes import Number, Record
from bitnet_lit.runs.folder import METRICS_NAME
from bitnet_lit.runs.job_folder import State, told
from bitnet_lit.terminal import time_span, wide_console
from bitnet_lit.training.callbacks.throughput import measured_peak_flops
from bitnet_lit.training.data import DEMO_DIR, filled_in, open_data, sequence_length
from bitnet_lit.training.distillation import teacher_of
from bitnet_lit.training.identity import run_identity
from bitnet_lit.training.initialize import build_network, fill_in_sizes
from bitnet_lit.training.launcher import check_launcher
from bitnet_lit.training.optimizers import build_optimizer
from bitnet_lit.training.plan import Plan, device_memory_bytes, memory_estimate_bytes, time_limit, world_size
from bitnet_lit.training.precision import has_device, uses_cuda
from bitnet_lit.training.run import import_classes, planned
from bitnet_lit.training.schedule import build_schedule
from bitnet_lit.training.start import read_start

TYPICAL_SHARE = 0.4  # of a matrix product's speed: demo 0.3, 768/12 on an H200 0.5 (guess from these two)
_COLUMNS = ("job", "state", "steps", "tokens left", "parameters", "memory", "time")
_SPEED = Record({}, optional={"perf/tokens_per_s": Number()})


@dataclass(frozen=True)
class Outlook:
    """Holds what a job would take.

    Attributes:
        plan: of the whole job.
        done: optimizer steps that are done.
        memory: bytes at most on a device, estimated.
    """

    plan: Plan
    done: int
    memory: float

    @property
    def tokens_left(self) -> int:
        return (self.plan.steps - self.done) * self.plan.tokens_per_step


def _uses_demo(config: TrainConfig) -> bool:
    return isinstance(config.data, DataConfig) and config.data.dir == str(DEMO_DIR)


def check_run(config: TrainConfig, demo_dir: Path = DEMO_DIR) -> Outlook:
    """Check a run as far as that is possible without training.

    Args:
        config: of a new run, or of one that goes on (`resume`).
        demo_dir: the demo corpus, if the run trains on that.

    Raises:
        UserError: the run would be refused.
    """
    import_classes(config)
    config = filled_in(config)
    if isinstance(config.data, DataConfig) and _uses_demo(config):
        config = replace(config, data=replace(config.data, dir=str(demo_dir)))
    check_launcher(config.trainer, world_size(config.trainer))
    start = None if config.resume is None else read_start(config.resume)
    if start is None and config.init_from is None and isinstance(config.model, ModelConfig):
        check_targets(config.export.targets, config.model, config.quant)
    teacher = teacher_of(config)
    data = open_data(config)
    length = sequence_length(config)
    if start is not None:
        sha256 = None if teacher is None else teacher.sha256
        start.check_identity(run_identity(config, data.identity(), data.tokenizer, length, sha256))
    fill_in_sizes(config, data)
    taught = None if teacher is None else teacher.accounting(length)
    model: nn.Module = build_network(config, on_meta=True, teacher=taught)
    plan = planned(config, data, model, start, teacher)
    time_limit(config.trainer.max_time)
    build_schedule(build_optimizer(model, config.optim), config.schedule, plan.warmup_steps, plan.schedule_steps)
    return Outlook(plan, 0 if start is None else min(start.step, plan.steps), memory_estimate_bytes(config, plan))


def _gpus(trainer: TrainerConfig) -> int:
    """Return how many GPUs a job computes on; 1 on a CPU, whose processes share its cores."""
    return world_size(trainer) if uses_cuda(trainer) else 1


def _speeds(jobs: Sequence[tuple[Path, TrainConfig, Outlook]]) -> dict[str, float]:
    """Return the FLOPs in a second that a device of the jobs reached that are done.

    They are given by the name of the jobs' weights, and by "" for all of them.
    """
    found: dict[str, list[float]] = {}
    for folder, config, outlook in jobs:
        try:
            metrics = read_json(folder / METRICS_NAME, _SPEED, "remove it")
        except UserError:
            continue
        if speed := metrics.get("perf/tokens_per_s"):
            flops = float(speed) * outlook.plan.flops_per_token / _gpus(config.trainer)
            for name in (config.quant.name, ""):
                found.setdefault(name, []).append(flops)
    return {name: statistics.median(speeds) for name, speeds in found.items()}


def _size(memory: float) -> str:
    return f"{memory / 2**30:,.1f} GiB" if memory >= 2**30 else f"{memory / 2**20:,.0f} MiB"


def preview(jobs: Sequence[tuple[str, Path, State, TrainConfig | UserError]]) -> None:
    """Check jobs and print what each would take.

    Args:
        jobs: name, folder, state, and the config or the error that its config has.

    Raises:
        UserError: every job would be refused.
        TrainingStopped: some of them would be.
    """
    with tempfile.TemporaryDirectory(prefix="bitnet-lit-demo-") as temporary:
        demo_dir = DEMO_DIR
        uses_demo = any(isinstance(config, TrainConfig) and _uses_demo(filled_in(config)) for *_, config in jobs)
        if uses_demo and not is_complete(DEMO_DIR):  # the run makes it, and a dry run writes nothing
            demo_dir = Path(temporary) / "demo"
            prepare(PrepareConfig(source=["demo"], out=str(demo_dir)))
        checked: list[Outlook | Exception] = []
        for *_, config in jobs:
            try:
                if isinstance(config, UserError):
                    raise config
                checked.append(check_run(config, demo_dir))
            except Exception as error:
                if not isinstance(error, (*MESSAGES, OSError)) and not is_out_of_memory(error):
                    raise
                checked.append(error)
    _print(jobs, checked)
    errors = [error for error in checked if isinstance(error, Exception)]
    if errors and len(errors) == len(jobs):
        raise errors[0]
    if errors:
        raise TrainingStopped(f"{len(errors)} of {len(jobs)} jobs would fail")


def _print(
    jobs: Sequence[tuple[str, Path, State, TrainConfig | UserError]], checked: Sequence[Outlook | Exception]
) -> None:
    whole = [
        (name, folder, state, config, outlook)
        for (name, folder, state, config), outlook in zip(jobs, checked, strict=True)
        if isinstance(outlook, Outlook) and isinstance(config, TrainConfig)
    ]
    speeds = _speeds([(folder, config, outlook) for _, folder, state, config, outlook in whole if state is State.DONE])
    source = "the jobs that are done"
    elsewhere = [config.trainer for *_, config, _ in whole if not has_device(config.trainer)]
    if not speeds and whole and not elsewhere:
        device, dtype = ("cuda", torch.bfloat16) if uses_cuda(whole[0][3].trainer) else ("cpu", torch.float32)
        speeds = {"": TYPICAL_SHARE * measured_peak_flops(torch.device(device), dtype)}
        source = "the speed of a matrix product here; rough"
    rows: list[tuple[str, ...]] = []
    seconds_in_all, tokens_in_all = 0.0, 0
    for (name, folder, state, config), outlook in zip(jobs, checked, strict=True):
        notes = []
        if state is State.FAILED:
            notes.append(without_class_name(told(folder) or ""))
        if isinstance(outlook, Exception) or isinstance(config, UserError):
            rows.append((name, state.value, "", "", "", "", "", one_line(f"would fail: {outlook}")))
            continue
        plan, is_done = outlook.plan, state is State.DONE
        left = 0 if is_done else outlook.tokens_left
        flops = 0.0 if is_done else plan.flops_after(outlook.done)
        speed = speeds.get(config.quant.name) or speeds.get("")
        seconds = flops / speed / _gpus(config.trainer) if speed else 0.0
        seconds_in_all, tokens_in_all = seconds_in_all + seconds, tokens_in_all + left
        has = device_memory_bytes(config.trainer)
        if outlook.memory > has and not is_done and has_device(config.trainer):
            notes.append(f"may not fit: a device has {_size(has)}")
        rows.append(
            (
                name,
                state.value,
                f"{outlook.done:,} of {plan.steps:,}" if state is State.HALF_DONE else f"{plan.steps:,}",
                f"{left:,}",
                f"{plan.accounting.parameters:,}",
                _size(outlook.memory),
                time_span(seconds) if speed and not is_done else "",
                one_line("; ".join(notes)),
            )
        )
    table = Table(*_COLUMNS, *["note"] * any(row[-1] for row in rows))
    for row in rows:
        table.add_row(*row[: len(table.columns)])
    output = wide_console(200)
    output.print(table)
    counts = Counter(state.value for _, _, state, _ in jobs)
    states = ", ".join(f"{counts[state.value]} {state.value}" for state in State if counts[state.value])
    line = f"dry run: {len(jobs)} job{'s' * (len(jobs) > 1)} ({states}); {tokens_in_all:,} tokens left"
    if speeds:
        has_sizes = all(outlook.plan.validation_sequences is not None for *_, outlook in whole)
        timed, further = ("training and validation", "") if has_sizes else ("training", "validation, ")
        line += f", about {time_span(seconds_in_all)} of {timed} one after the other (from {source}); "
        line += f"start-up, {further}sample texts and export come on top"
    output.print(f"{line}. Nothing was trained or written.")
    here = torch.cuda.device_count()
    asked = [config.trainer for *_, config, _ in whole if uses_cuda(config.trainer)]
    if more := [trainer.devices for trainer in asked if world_size(trainer) > here * trainer.num_nodes]:
        output.print(f"note: trainer.devices={more[0]}: this machine has {here}, and would refuse to train")
    if elsewhere:
        unknown = "whether the memory is enough" if speeds else "the time and whether the memory is enough"
        output.print(
            f"note: trainer.accelerator={elsewhere[0].accelerator}: this machine has no such device, and would refuse "
            f"to train: a dry run on a machine that has one tells {unknown}"
        )
