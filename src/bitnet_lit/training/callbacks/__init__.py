"""Callbacks measure, save and export a run. Each one has its own module.

`build_callbacks` makes those that the config asks for, and puts them into the order in which Lightning must call them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar

from bitnet_lit.config import ModelConfig, TrainConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.instantiate import instantiate
from bitnet_lit.training.callbacks.checkpoints import Checkpoints
from bitnet_lit.training.callbacks.export import ExportModelFolder
from bitnet_lit.training.callbacks.profile import Profile
from bitnet_lit.training.callbacks.progress import RichBar
from bitnet_lit.training.callbacks.samples import SampleStories
from bitnet_lit.training.callbacks.sweep_metric import SweepMetric
from bitnet_lit.training.callbacks.ternary_health import TernaryHealth
from bitnet_lit.training.callbacks.throughput import Throughput
from bitnet_lit.training.compile import CompileTime
from bitnet_lit.training.plan import Plan
from bitnet_lit.training.precision import resolved_precision

# Lightning before 2.6 has only the first.
AVERAGING = tuple(
    getattr(lightning_callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if hasattr(lightning_callbacks, name)
)


def extra_callbacks(config: TrainConfig) -> list[Callback]:
    """Return the callbacks of `callbacks.extra`. An entry that is null was removed by the user.

    Raises:
        UserError: an entry cannot be made, is no callback, writes checkpoints beside ours, averages latent weights, or
            is a second progress bar; or two entries keep their state under one name.
    """
    made: dict[str, Callback] = {}
    for name, values in config.callbacks.extra.items():
        key = f"callbacks.extra.{name}"
        if values is None:
            continue
        callback = instantiate(values, key)
        if isinstance(callback, Checkpoint):
            raise UserError(
                f"{key}: {type(callback).__name__} would write checkpoints beside ours: last.ckpt and best.ckpt are "
                "always written, callbacks.checkpoint_every_n_steps=<steps> writes more often"
            )
        if isinstance(callback, AVERAGING) and config.quant.scheme.quantizes:
            raise UserError(
                f"{key}: {type(callback).__name__} averages latent weights, and the average of weights rounds to codes "
                "that nobody trained: leave it out, or take quant=none"
            )
        if isinstance(callback, ProgressBar) and config.callbacks.progress_bar:
            raise UserError(f"{key}: a run has one progress bar: leave ours out: callbacks.progress_bar=false")
        if not isinstance(callback, Callback):
            raise UserError(f"{key}: {type(callback).__name__} is no callback: derive it from lightning's Callback")
        for other, present in made.items():
            if callback.state_key == present.state_key and callback.state_dict():
                raise UserError(
                    f"{key} and callbacks.extra.{other}: both keep a state under the name {callback.state_key}: give "
                    "their class a state_key that tells them apart"
                )
        made[name] = callback
    return list(made.values())


def build_callbacks(
    config: TrainConfig,
    plan: Plan,
    run_dir: Path,
    tokenizer: Tokenizer | None,
    facts: dict[str, Any],
    checkpoints: Checkpoints,
) -> list[Callback]:
    """Return the callbacks of a run in the order in which they are called.

    First come those that measure and the user's own, then `StepLog`, `Checkpoints`, and the export of the model folder.
    So a checkpoint holds the state that the earlier callbacks have after the same step.

    Args:
        facts: plain data for config.json of the model folder (see `ExportModelFolder`).
    """
    wanted = config.callbacks
    callbacks: list[Callback] = []
    if wanted.ternary_health and config.quant.scheme.quantizes:
        callbacks.append(TernaryHealth(run_dir))
    if config.compile != "false":
        callbacks.append(CompileTime())
    if wanted.throughput:
        callbacks.append(Throughput(plan, resolved_precision(config.trainer)))
    # Generation needs the key-value cache, which a network of the user's own does not have.
    if wanted.sample_prompts and tokenizer is not None and isinstance(config.model, ModelConfig):
        callbacks.append(SampleStories(run_dir, tokenizer, list(wanted.sample_prompts), wanted.sample_max_new_tokens))
    if wanted.profile_steps:
        callbacks.append(Profile(run_dir, wanted.profile_steps))
    callbacks += extra_callbacks(config) + SweepMetric.needed(config)
    callbacks += [checkpoints.step_log, checkpoints, ExportModelFolder(run_dir, config, tokenizer, facts, checkpoints)]
    if wanted.progress_bar:
        callbacks.append(RichBar(plan, checkpoints.step_log))
    return callbacks
