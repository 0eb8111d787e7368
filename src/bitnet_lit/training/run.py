"""`train` does one run, from a config to a run folder. The command, the tests and notebooks call it.

`runs/folder.py` says what the folder holds and which run owns it. `callbacks/checkpoints.py` explains how a run that
was killed goes on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from bitnet_lit.config import CustomNetwork, ModelConfig, TrainConfig, TrainerConfig
from bitnet_lit.config.slots import as_values
from bitnet_lit.errors import TrainingStopped, disk_errors
from bitnet_lit.exports.targets import check_targets
from bitnet_lit.instantiate import locate, named_classes
from bitnet_lit.model.custom import count
from bitnet_lit.model.layers import joint_layers
from bitnet_lit.quant.kernels.choose import describe
from bitnet_lit.runs.folder import CHECKPOINTS, LAST, METRICS_NAME, check_free, clean, locked
from bitnet_lit.runs.meeting import all_or_none
from bitnet_lit.runs.ranks import is_first_of_node, rank
from bitnet_lit.runs.signals import StopSignals
from bitnet_lit.training.callbacks import build_callbacks
from bitnet_lit.training.callbacks.checkpoints import Checkpoints
from bitnet_lit.training.callbacks.step_log import StepLog
from bitnet_lit.training.checkpoint_file import link_checkpoint
from bitnet_lit.training.compile import compile_networks, compiles
from bitnet_lit.training.data import RunData, filled_in, open_data, sequence_length
from bitnet_lit.training.distillation import Distillation, Teacher, teacher_of
from bitnet_lit.training.failures import in_one_line
from bitnet_lit.training.freed_memory import keep_freed_memory
from bitnet_lit.training.identity import run_identity
from bitnet_lit.training.initialize import initial_model, optimizer_state
from bitnet_lit.training.launcher import check_launcher
from bitnet_lit.training.loggers import CsvLogger, build_loggers, log_hyperparams
from bitnet_lit.training.module import BitNetModule
from bitnet_lit.training.optimizers import build_optimizer
from bitnet_lit.training.plan import Plan, make_plan, time_limit, world_size
from bitnet_lit.training.plan_table import print_plan
from bitnet_lit.training.precision import resolved_precision, tf32
from bitnet_lit.training.result import write_result
from bitnet_lit.training.resume import save_config
from bitnet_lit.training.schedule import build_schedule
from bitnet_lit.training.start import Start, read_start
from bitnet_lit.training.started_ranks import left_as_found
from bitnet_lit.training.trainer import build_trainer

_ELSEWHERE = "give another folder (hydra.run.dir=...)"


def _quieten() -> None:
    """Silence Lightning's hints that do not apply here, such as the advice to use more DataLoader workers."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (
        ".*GPU available but not used.*",  # the user asked for the CPU
        ".*sync_dist=True.*",  # those figures are the same on every rank already
        ".*`broadcast_buffers` is deprecated.*",
        ".*does not have many workers.*",
        ".*ModelCheckpoint.*",
        ".*LeafSpec.*",
        ".*is not resumable.*",
        ".*callbacks used to create the checkpoint.*",
        ".*AccumulateGrad node's stream.*",  # Lightning builds DDP on a stream of its own
    ):
        warnings.filterwarnings("ignore", message)


def recipe(config: TrainConfig, plan: Plan) -> dict[str, str]:
    """Return how a model was trained, as lines of plain text for its model card."""
    optim = config.optim
    rates = f"{optim.name}, peak {optim.learning_rate:g}, weight decay {optim.weight_decay:g}"
    start = {"quantization": f"from step {plan.quantization_step:,} on"} if plan.quantization_step else {}
    return {
        "training": f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens, {plan.tokens:,} in all",
        "optimizer": f"{rates}, {config.schedule.name}, seed {config.seed}",
        **start,
        # The model folder may be given to others, so it must not hold a path of this machine.
        "started from": Path(config.init_from).name if config.init_from else "random weights",
    }


def validation_part(trainer: TrainerConfig, plan: Plan) -> str | None:
    """Describe the part of the validation split that every validation takes; None where it is the whole split."""
    limit, sequences = trainer.limit_val_batches, plan.validation_sequences
    if limit is None or (sequences is not None and sequences[0] == sequences[1]):
        return None
    size = plan.samples_per_step // trainer.accumulate_grad_batches
    share = f"{limit} of the batches" if isinstance(limit, float) else f"{limit} batch{'es' * (limit > 1)}"
    return f"{share} of {size} sequences"


def planned(config: TrainConfig, data: RunData, model: nn.Module, start: Start | None, teacher: Teacher | None) -> Plan:
    """Return the plan of a run, and make sure that its teacher and the checkpoint that it goes on from fit it.

    Args:
        config: with every size filled in.
        model: the network, which may be on the meta device.

    Raises:
        UserError: one of them does not fit, or the lengths contradict each other.
    """
    length = sequence_length(config)
    counted = count(model, config.quant) if isinstance(config.model, CustomNetwork) else None
    if teacher is not None:
        teacher.check(config, data.tokenizer, length)
    taught = None if teacher is None else teacher.accounting(length)
    sequences = data.num_validation_sequences(config, length)
    plan = make_plan(config, length, data.num_train_sequences(length), sequences, counted, taught)
    if start is None:
        return plan
    plan = start.plan(plan)
    start.check_weights(model)
    start.check_incomplete(plan.steps, config.callbacks.extra)
    return plan


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model. Every file of the run is written to `config.run_dir`.

    Returns:
        The figures at the end of the run: val/loss and the other val/ metrics over the whole validation split,
        val/best_loss (the least val/loss in metrics.csv), train/loss, steps, tokens, parameters, run_dir. Losses are in
        nats per token.

    Raises:
        UserError: the config or the data cannot be trained on, or the data cannot be read any more.
        TrainingStopped: the run diverged, or a signal asked it to stop. The run can be resumed from its last
            checkpoint.
        DiskError: the disk is full.
    """
    _quieten()
    keep_freed_memory()
    with StopSignals() as signals, contextlib.ExitStack() as holding:
        metrics = _train(config, signals, holding)
    if signals.number is not None:  # it came too late to stop the run, but its sender expects this exit status
        name = signal.Signals(signals.number).name
        raise TrainingStopped(f"{name}: {config.run_dir} is complete", status=128 + signals.number)
    return metrics


def import_classes(config: TrainConfig) -> None:
    """Import the classes of the user's own, so that one that is missing is reported before any data is read.

    The class of the scheme is left out: in a resumed run the folder may be the only one to name it, and then the scheme
    is looked up by its name.

    Raises:
        UserError: a class cannot be imported.
    """
    slots = {name: values for name, values in as_values(config).items() if name != "quant"}
    for key, target in named_classes(slots):
        locate(target, key)


def _train(config: TrainConfig, signals: StopSignals, holding: contextlib.ExitStack) -> dict[str, Any]:
    config = filled_in(config)
    run_dir, is_owner = Path(config.run_dir), rank() == 0
    rank_zero_only.rank = rank()  # type: ignore[attr-defined]  # Lightning does not read NODE_RANK until fit
    check_launcher(config.trainer, world_size(config.trainer))
    start, identity, replaced = None, {}, []
    in_all = functools.partial(all_or_none, rank(), config.trainer.num_nodes, f"the start of {run_dir}")
    with in_all():  # what may be refused; no file of an earlier run changes here
        import_classes(config)
        if config.resume is not None:
            if is_owner:
                holding.enter_context(locked(run_dir))
            start = read_start(config.resume)
        elif config.init_from is None and isinstance(config.model, ModelConfig):
            check_targets(config.export.targets, config.model, config.quant)
        teacher = teacher_of(config)
        data = open_data(config)
        tokenizer = data.tokenizer
        # Reading a large teacher takes a while: one rank of a node does it, and for a new run only the folder's owner.
        has_hashed = is_owner or (start is not None and is_first_of_node())
        sha256 = teacher.sha256 if teacher is not None and has_hashed else None
        if start is not None:
            identity = run_identity(config, data.identity(), tokenizer, sequence_length(config), sha256)
            start.check_identity(identity, has_hashed)
        taught = None if teacher is None else teacher.accounting(sequence_length(config))
        model = initial_model(config, data, taught)  # fills in the sizes
        length = sequence_length(config)
        plan = planned(config, data, model, start, teacher)
        max_time = time_limit(config.trainer.max_time)
        datamodule = data.datamodule(config, length, plan.samples_per_step)
        moments = None
        if config.init_from and config.init_optimizer and start is None:
            moments = optimizer_state(config.init_from)
        distillation = None if teacher is None else Distillation(config, teacher)
        module = BitNetModule(model, config, plan, tokenizer, moments, distillation)
        # As a trial, so that a class of the user's own that fails is reported before the folder is taken.
        build_schedule(build_optimizer(model, config.optim), config.schedule, plan.warmup_steps, plan.schedule_steps)
        if is_owner and start is None:
            identity = run_identity(config, data.identity(), tokenizer, length, sha256)
            replaced = _lock_new_folder(run_dir, holding)
        csv_logger = CsvLogger(run_dir, start.step if start else 0, start.state.get("csv_rows") if start else None)
        precision = resolved_precision(config.trainer)
        checkpoints = Checkpoints(
            run_dir / CHECKPOINTS,
            config.callbacks.checkpoint_every_n_steps,
            plan.steps,
            max_time,
            signals,
            csv_logger,
            StepLog(),
            identity,
            precision,
            validation_part(config.trainer, plan),
            config.callbacks.extra,
        )
        facts = {"sequence_length": length, "seed": config.seed, "recipe": recipe(config, plan)}
        trainer = build_trainer(
            config,
            plan,
            run_dir,
            callbacks=build_callbacks(config, plan, run_dir, tokenizer, facts, checkpoints),
            logger=build_loggers(config, run_dir, csv_logger, start.step if start else 0),
        )
        dtype = torch.bfloat16 if trainer.precision.startswith("bf16") else torch.float32
        is_compiled = compiles(config, trainer.strategy.root_device)
        kernels = describe(model, trainer.strategy.root_device, dtype, joint_layers(model), is_compiled)
        if is_compiled:
            compile_networks(*([model] if distillation is None else [model, distillation.teacher]))
            if distillation is not None:
                distillation.compile()
    with in_all():  # the run can begin in every process
        if is_owner:
            _take_folder(config, run_dir, start, replaced)
            if start is not None:
                csv_logger.save()  # without the rows that were written after the checkpoint
            elif config.logger.tensorboard:
                log_hyperparams(trainer.loggers, config)
    if trainer.is_global_zero:
        device = f"{trainer.num_devices} x {trainer.strategy.root_device}, {precision}"
        rows = {"run": run_dir, "data": data.described(plan.tokens, length), "device": device}
        if start is not None:
            rows["from"] = f"step {start.step}, {start.path}"
            if start.state.get("precision", precision) != precision:
                rows["device"] = f"{device} (up to step {start.step} it was {start.state['precision']})"
        elif config.init_from:
            rows["from"] = f"{config.init_from}, {'with' if moments else 'without'} its optimizer's state"
        if kernels is not None:
            rows["kernels"] = kernels
        print_plan(config, plan, rows)
    with in_one_line(lambda: checkpoints.folder.parent, trainer.world_size, trainer.global_rank):
        try:
            with left_as_found(trainer), tf32(config.trainer):
                trainer.fit(module, datamodule=datamodule, ckpt_path=start.path if start else None)
        finally:
            module.release_weights()
            if config.logger.wandb:
                import wandb

                wandb.finish()  # one run per job of a sweep
        return write_result(config, plan, trainer, checkpoints)


def _lock_new_folder(run_dir: Path, holding: contextlib.ExitStack) -> list[Path]:
    """Lock the folder of a new run, and return the files in it that the run replaces.

    Args:
        holding: keeps the lock until the run ends.

    Raises:
        UserError: the folder belongs to another run, or cannot be made.
    """
    with disk_errors(f"run_dir={run_dir}", refused=_ELSEWHERE):
        run_dir.mkdir(parents=True, exist_ok=True)
        return check_free(run_dir, holding.enter_context(locked(run_dir)))


def _take_folder(config: TrainConfig, run_dir: Path, start: Start | None, replaced: list[Path]) -> None:
    """Take the locked run folder for this run: remove what killed processes left in it, and write config.yaml.

    Args:
        start: the checkpoint of a resumed run; None for a new run.
        replaced: the files of an earlier run that a new run replaces.
    """
    with disk_errors(f"run_dir={run_dir}", refused=_ELSEWHERE):
        for path in replaced:
            path.unlink(missing_ok=True)
        if start is not None:
            if start.path.name != LAST:
                link_checkpoint(start.path, run_dir / CHECKPOINTS / LAST)
            (run_dir / METRICS_NAME).unlink(missing_ok=True)  # the run is not complete (any more)
        clean(run_dir)
        save_config(config, run_dir)
