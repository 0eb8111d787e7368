"""One run, from a config to a folder: what the door, the tests and notebooks call.

::

    outputs/<date>/<time>/
      config.yaml        the whole config
      metrics.csv        one row per logged step
      metrics.json       the figures at the end; its presence says that the run is complete
      checkpoints/       last.ckpt and best.ckpt, for resume
      model/             the best model so far (model_last/ too, when the run ends with another)
"""

from __future__ import annotations

import ctypes
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only

from bitnet_lit.artifacts.targets import check_targets
from bitnet_lit.atomic import atomic_file
from bitnet_lit.config import PrepareConfig, TrainConfig
from bitnet_lit.data.datamodule import BitNetDataModule
from bitnet_lit.data.json_tokenizer import open_tokenizer
from bitnet_lit.data.meta import is_complete
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.shards import ShardDirectory, open_shards
from bitnet_lit.errors import UserError
from bitnet_lit.inference.evaluation import TextBytes
from bitnet_lit.model.layers import DecoderLayer
from bitnet_lit.training.callbacks import build_callbacks
from bitnet_lit.training.callbacks.checkpoints import LAST
from bitnet_lit.training.initialize import initial_model, optimizer_state
from bitnet_lit.training.loggers import build_loggers
from bitnet_lit.training.module import BitNetModule
from bitnet_lit.training.plan import Plan, make_plan, print_plan
from bitnet_lit.training.resume import checkpoint_step, save_config

DEMO_DIR = Path("data/demo")
METRICS_NAME = "metrics.json"


def _open_data(config: TrainConfig) -> ShardDirectory:
    """The shards of `data.dir`; without one, those in data/demo, written first if there are none."""
    if config.data.dir is None:
        config.data.dir = str(DEMO_DIR)
        if not is_complete(DEMO_DIR):  # two ranks may come here at once: `prepare` lets one write and the other wait
            prepare(PrepareConfig(source="demo", out=config.data.dir))
    tokenizer = None if config.data.tokenizer is None else Path(config.data.tokenizer)
    return open_shards(Path(config.data.dir), tokenizer)


def _sequence_length(config: TrainConfig) -> int:
    context = config.model.max_position_embeddings
    length = config.data.sequence_length or context
    if length > context:
        raise UserError(
            f"data.sequence_length={length} is longer than model.max_position_embeddings={context}: raise the latter"
        )
    return length


def _strategy(config: TrainConfig) -> str | Strategy:
    if config.trainer.strategy == "ddp":
        # The only buffers are constant tables: no need to send them round before each forward pass.
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    if config.trainer.strategy == "fsdp":
        return FSDPStrategy(auto_wrap_policy={DecoderLayer}, state_dict_type="full")
    return "auto"


def _build_trainer(config: TrainConfig, plan: Plan, run_dir: Path, **parts: Any) -> L.Trainer:
    options = config.trainer
    try:
        return L.Trainer(
            accelerator=options.accelerator,
            devices=options.devices if isinstance(options.devices, int | str) else list(options.devices),
            num_nodes=options.num_nodes,
            strategy=_strategy(config),
            precision=options.precision,  # type: ignore[arg-type]  # checked by the schema
            max_epochs=-1,  # the data has no end: steps count
            max_steps=plan.steps,
            max_time=options.max_time,
            check_val_every_n_epoch=None,
            val_check_interval=plan.validation_steps * options.accumulate_grad_batches,
            accumulate_grad_batches=options.accumulate_grad_batches,
            log_every_n_steps=options.log_every_n_steps,
            deterministic=options.deterministic,
            benchmark=options.benchmark,
            detect_anomaly=options.detect_anomaly,
            default_root_dir=run_dir,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the order is ours
            enable_checkpointing=False,  # so are the checkpoints
            enable_model_summary=False,
            enable_progress_bar=config.callbacks.progress_bar,
            **parts,
        )
    except MisconfigurationException as error:
        raise UserError(f"trainer.accelerator={options.accelerator}: {error}") from None


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of giving them back to the system after every tensor.

    Each step allocates the same sizes again; fresh pages must be zeroed at every fault, which cost 13 % of a BitNet
    step (192 hidden, 4 layers, 8 x 256 tokens) on two CPU cores. Other C libraries do not know the call.
    """
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "mallopt"):
        trim_threshold, mmap_threshold, most = -1, -3, 2**30  # malloc.h
        library.mallopt(mmap_threshold, most)
        library.mallopt(trim_threshold, 2**31 - 1)


def _quieten() -> None:
    """Lightning's hints that do not fit: our loader needs no workers, our logger needs no hint."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*ModelCheckpoint.*",
        ".*LeafSpec.*",
        ".*is not resumable.*",
    ):
        warnings.filterwarnings("ignore", message)


def recipe(config: TrainConfig, plan: Plan) -> dict[str, str]:
    """How a model was trained, in a few lines of plain text: what its model card says."""
    optim = config.optim
    rates = f"{optim.name}, peak {optim.learning_rate:g}, weight decay {optim.weight_decay:g}"
    return {
        "training": f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens, {plan.tokens:,} in all",
        "optimizer": f"{rates}, {config.schedule.name}, seed {config.seed}",
        "started from": config.init_from or "random weights",
    }


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model; everything it leaves lies in `config.run_dir`.

    Returns:
        The figures at the end: val/loss and its kin over the whole validation split, val/best_loss, train/loss,
        steps, tokens, parameters, run_dir.

    Raises:
        UserError: a config or data that cannot be trained on, before the first step.
        TrainingStopped: it diverged, or a signal asked it to stop; the folder can be resumed.
    """
    _quieten()
    _keep_freed_memory()
    run_dir = Path(config.run_dir)
    resume_step = checkpoint_step(run_dir) if config.resume else 0
    if config.init_from is None:
        check_targets(config.export.targets, config.model, config.quant)
    shards = _open_data(config)
    model = initial_model(config, shards)
    length = _sequence_length(config)
    plan = make_plan(config, length, shards.train(length).num_sequences)
    if resume_step >= plan.steps:
        raise UserError(
            f"resume={config.resume}: complete at step {resume_step}: give a larger trainer.max_steps to go on"
        )
    tokenizer = open_tokenizer(shards.tokenizer_path) if shards.tokenizer_path else None
    datamodule = BitNetDataModule(
        config.data, shards, length, plan.samples_per_step, config.trainer.limit_val_batches, config.seed
    )
    moments = optimizer_state(config.init_from) if config.init_from and config.init_optimizer else None
    module = BitNetModule(model, config, plan, TextBytes(tokenizer) if tokenizer else None, moments)
    run_dir.mkdir(parents=True, exist_ok=True)
    facts = {
        "data_dir": str(Path(config.data.dir or "").absolute()),
        "sequence_length": length,
        "seed": config.seed,
        "recipe": recipe(config, plan),
    }
    callbacks = build_callbacks(config, plan, run_dir, tokenizer, facts)
    loggers = build_loggers(config, run_dir, resume_step)
    trainer = _build_trainer(config, plan, run_dir, callbacks=callbacks, logger=loggers)
    uses_cuda = trainer.strategy.root_device.type == "cuda"
    if config.compile == "true" or (config.compile == "auto" and uses_cuda):
        model.compile()  # in place: parameter names stay
    if trainer.is_global_zero:
        save_config(config, run_dir)
        device = f"{trainer.num_devices} x {trainer.strategy.root_device}, {config.trainer.precision}"
        rows = {"run": run_dir, "data": config.data.dir, "device": device}
        if config.init_from:
            rows["from"] = f"{config.init_from}, {'with' if moments else 'without'} its optimizer's state"
        print_plan(config, plan, rows)
    try:
        ckpt_path = run_dir / "checkpoints" / LAST if config.resume else None
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    finally:
        if config.logger.wandb:
            import wandb

            wandb.finish()  # one run per job of a sweep
    return _report(config, plan, trainer, callbacks[0].best_loss)  # type: ignore[attr-defined]


def _report(config: TrainConfig, plan: Plan, trainer: L.Trainer, best_loss: float) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(("val/", "train/loss", "perf/", "ternary/"))
    }
    metrics |= {
        "val/best_loss": best_loss,
        "steps": trainer.global_step,
        "tokens": trainer.global_step * plan.tokens_per_step,
        "parameters": plan.accounting.parameters,
        "model": config.model.name,
        "quant": config.quant.name,
        "seed": config.seed,
        "run_dir": str(config.run_dir),
    }
    _write_json(Path(config.run_dir) / METRICS_NAME, metrics)
    return metrics


@rank_zero_only
def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
