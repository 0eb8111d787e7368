"""`build_trainer` makes Lightning's Trainer for a run.

Its flags come from three places: the keys of `trainer`, what every run here decides by itself, and `trainer.extra`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO as AnyCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.profilers import PassThroughProfiler

from bitnet_lit.config import TrainConfig, TrainerConfig
from bitnet_lit.config.slots import TARGET
from bitnet_lit.did_you_mean import words_for
from bitnet_lit.errors import UserError, nearest, one_line
from bitnet_lit.instantiate import instantiate
from bitnet_lit.training.checkpoint_file import CheckpointIO
from bitnet_lit.training.plan import Plan
from bitnet_lit.training.precision import resolved_precision
from bitnet_lit.training.strategies import strategy_of


def extra_flags(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of `trainer.extra` for Lightning's Trainer. A value with a `_target_` becomes an object.

    Raises:
        UserError: Lightning has no such flag, the flag has a key of its own in `TrainerConfig`, or every run here
            decides it (`WORDS` in other_names.py).
    """
    known = list(inspect.signature(L.Trainer.__init__).parameters)[1:]
    own_keys = {field.name for field in fields(TrainerConfig)}
    decided = {flag: words for flag in known if (words := words_for("train", f"trainer.{flag}"))}
    flags: dict[str, Any] = {}
    for flag, value in extra.items():
        key = f"trainer.extra.{flag}"
        if flag in own_keys:
            raise UserError(f"{key}={value}: has a key of its own: trainer.{flag}=")
        if flag in decided:
            raise UserError(f"{key}={value}: {decided[flag]}")
        if flag not in known:
            near = nearest(flag, known)
            raise UserError(
                f"{key}: Lightning's Trainer has no such flag: "
                + (
                    f"did you mean {near}?"
                    if near
                    else f"it has {', '.join(sorted({*known} - own_keys - decided.keys()))}"
                )
            )
        if isinstance(value, Mapping) and TARGET in value:
            value = instantiate(value, key)
        elif isinstance(value, list):
            value = [
                instantiate(item, f"{key}[{number}]") if isinstance(item, Mapping) else item
                for number, item in enumerate(value)
            ]
        flags[flag] = value
    return flags


def _plugins(given: Any) -> list[Any]:
    plugins = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    if any(isinstance(plugin, AnyCheckpointIO) for plugin in plugins):
        raise UserError("trainer.extra.plugins: checkpoint files are written and checked here: leave CheckpointIO out")
    return [CheckpointIO(), *plugins]


class NoProfiler(PassThroughProfiler):
    """Gives every action the same empty context. Lightning asks for about 55 in a step, one for each hook.

    Its own profiler that does nothing makes them from a generator, which takes several times as long.
    """

    _nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        """Return a context that does nothing."""
        return self._nothing


def build_trainer(config: TrainConfig, plan: Plan, run_dir: Path, **parts: Any) -> L.Trainer:
    """Return Lightning's Trainer for a run.

    Args:
        parts: further arguments of the Trainer: its callbacks and loggers.

    Raises:
        UserError: the device does not exist, or flags contradict each other.
    """
    options = config.trainer
    extra = extra_flags(options.extra)
    flags: dict[str, Any] = {
        "enable_model_summary": False,
        # A tensor of inference mode cannot be trained on later, and FSDP2 keeps the tensors into which it gathers.
        "inference_mode": options.strategy != "fsdp",
        "profiler": NoProfiler(),
        **extra,
        "plugins": _plugins(extra.get("plugins")),
    }
    try:
        trainer = L.Trainer(
            accelerator=options.accelerator,
            devices=options.devices if isinstance(options.devices, int | str) else list(options.devices),
            num_nodes=options.num_nodes,
            strategy=strategy_of(config),
            precision=resolved_precision(options),  # type: ignore[arg-type]  # one of Lightning's names
            max_epochs=-1,  # the data repeats without end, so steps are counted
            max_steps=-1,  # `Checkpoints` ends the run, so a resumed run can still do the work of the end
            check_val_every_n_epoch=None,
            val_check_interval=plan.validation_steps * options.accumulate_grad_batches,
            accumulate_grad_batches=options.accumulate_grad_batches,
            log_every_n_steps=options.log_every_n_steps,
            deterministic=options.deterministic,
            benchmark=options.benchmark,
            detect_anomaly=options.detect_anomaly,
            default_root_dir=run_dir,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # our data module splits the data over the ranks
            enable_checkpointing=False,  # `Checkpoints` writes them
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in parts.get("callbacks", ())),
            **flags,
            **parts,
        )
        # Since 2.6 the ranks ask each other about SIGTERM before every batch, and wait for their devices to hear the
        # answer. `Checkpoints` does it without waiting.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        # `StopSignals` handles signals. Lightning would tell the other ranks of a SIGTERM from inside its handler, when
        # they may not listen. On SLURM it would write checkpoints of its own and requeue the job.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer
    except MisconfigurationException as error:
        # Lightning's text names no flag. If there are no extra flags, the cause is a device that does not exist.
        if extra:
            raise UserError(f"trainer.extra: {error}") from None
        raise UserError(
            f"trainer.accelerator={options.accelerator}: {error} Take trainer.accelerator=auto: the best there is"
        ) from None
    except (TypeError, ValueError) as error:
        if not extra:
            raise
        raise UserError(f"trainer.extra: {one_line(error)}") from error
