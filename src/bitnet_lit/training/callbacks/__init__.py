"""What watches a run, one idea a file; `build_callbacks` puts together those that the config asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from bitnet_lit.config import TrainConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.training.callbacks.checkpoints import Checkpoints
from bitnet_lit.training.callbacks.export import ExportModelFolder
from bitnet_lit.training.callbacks.profile import Profile
from bitnet_lit.training.callbacks.progress import RichBar
from bitnet_lit.training.callbacks.samples import SampleStories
from bitnet_lit.training.callbacks.ternary_health import TernaryHealth
from bitnet_lit.training.callbacks.throughput import Throughput
from bitnet_lit.training.plan import Plan


def build_callbacks(
    config: TrainConfig,
    plan: Plan,
    run_dir: Path,
    tokenizer: Tokenizer | None,
    facts: dict[str, Any],
    checkpoints: Checkpoints,
) -> list[Callback]:
    """The callbacks of a run, in the order they are called: what writes rows, then what saves, then what exports.

    Args:
        facts: plain data that the model folder keeps (see `ExportModelFolder`).
    """
    wanted = config.callbacks
    callbacks: list[Callback] = []
    if wanted.ternary_health and config.quant.scheme.quantizes:
        callbacks.append(TernaryHealth(run_dir))
    if wanted.throughput:
        callbacks.append(Throughput(plan, config.trainer.precision))
    if wanted.sample_prompts and tokenizer is not None:
        callbacks.append(SampleStories(run_dir, tokenizer, list(wanted.sample_prompts), wanted.sample_max_new_tokens))
    if wanted.profile_steps:
        callbacks.append(Profile(run_dir, wanted.profile_steps))
    callbacks += [checkpoints, ExportModelFolder(run_dir, config, tokenizer, facts, checkpoints)]
    if wanted.progress_bar:
        callbacks.append(RichBar(plan))
    return callbacks
