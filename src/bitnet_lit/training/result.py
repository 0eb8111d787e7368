"""The end of a run: metrics.json, and the last lines on the terminal: its loss, its model, and how to try it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from bitnet_lit.checkpoints.formats.format import infer_command
from bitnet_lit.config import DataConfig, ModelConfig, TrainConfig
from bitnet_lit.data.tokenizers import find_tokenizer
from bitnet_lit.files.atomic import atomic_file
from bitnet_lit.runs.folder import METRICS_NAME, MODEL
from bitnet_lit.terminal import console
from bitnet_lit.training.callbacks.checkpoints import Checkpoints
from bitnet_lit.training.plan import Plan


def write_result(config: TrainConfig, plan: Plan, trainer: L.Trainer, checkpoints: Checkpoints) -> dict[str, Any]:
    """Write metrics.json, print the result, and return the figures of the run, as `train` describes them."""
    metrics: dict[str, Any] = {
        **checkpoints.figures,
        "val/best_loss": checkpoints.best_loss,
        "steps": trainer.global_step,
        "tokens": trainer.global_step * plan.tokens_per_step,
        "parameters": plan.accounting.parameters,
        "model": config.model.name,
        "quant": config.quant.name,
        "seed": config.seed,
        "run_dir": str(config.run_dir),
    }
    schemes = config.schemes if config.quant._target_ is None else [config.quant._target_]
    count = config.data.max_val_sequences if isinstance(config.data, DataConfig) else None
    split = "the whole validation split" if count is None else f"at most {count:,} validation sequences"
    _write(Path(config.run_dir), metrics, split, checkpoints.best_step, isinstance(config.model, ModelConfig), schemes)
    return metrics


@rank_zero_only
def _write(
    run_dir: Path, metrics: dict[str, Any], split: str, best_step: int | None, is_own: bool, schemes: Sequence[str]
) -> None:
    with atomic_file(run_dir / METRICS_NAME) as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for name, text in _last_lines(run_dir, metrics, split, best_step, is_own, schemes).items():
        console(stderr=True).print(f"{name:<11} {text}", markup=False, highlight=False)


def _last_lines(
    run_dir: Path,
    metrics: dict[str, Any],
    split: str,
    best_step: int | None,
    is_own: bool,
    schemes: Sequence[str] = (),
) -> dict[str, str]:
    """Return the lines by their names. `infer` opens models with this package's network and a tokenizer.

    Args:
        split: says on which sequences val/loss was measured.
        best_step: the optimizer step of the model in model/.
        is_own: whether the network is this package's.
        schemes: classes of the user's own that `infer` must be allowed to import.
    """
    bits = metrics.get("val/bits_per_byte")
    done = f"step {metrics['steps']:,}, val/loss {metrics['val/loss']:.4f} on {split}"
    done += "" if bits is None else f", {bits:.4f} bits per byte"
    is_best = best_step in (None, metrics["steps"])
    lines = {"done": done + ("" if is_best else f"; the best model is that of step {best_step:,}")}
    model = run_dir / MODEL
    if model.is_dir():
        lines["model"] = str(model)
    if is_own and find_tokenizer(model) is not None:
        lines["next"] = shlex.join(infer_command(run_dir, schemes))
    return lines
