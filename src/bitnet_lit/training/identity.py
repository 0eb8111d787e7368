"""The identity of a run: what must not change between the part before a resume and the part behind it.

The network's sizes and rules, the seed and the length of a sequence decide what the weights mean and which tokens come
next; so do the shards and their tokenizer. All of it stands in each checkpoint, as one flat mapping of plain values,
and is compared when a run is resumed: a config.yaml that was edited, shards that were prepared again.

Of the shards it notes sizes and a hash of a few blocks of each, which finds another text or another tokenizer and
reads a megabyte per shard.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bitnet_lit.config import ModelConfig, TrainConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError

# These do not change what the weights mean: they may be given anew.
_FREE = {
    "model.name",
    *(f"model.{key}" for key in ModelConfig.TRAINING),
    "quant.lambda_warmup_steps",
    "quant.lambda_warmup_shape",
    "quant._target_",  # where a scheme's class lies; its name and its settings are compared
}


def run_identity(
    config: TrainConfig, data: dict[str, Any], tokenizer: Tokenizer | None, sequence_length: int
) -> dict[str, Any]:
    """The mapping.

    Args:
        config: with every value filled in.
        data: what the data says of itself (`RunData.identity`).
    """
    identity: dict[str, Any] = {"seed": config.seed, "optim.name": config.optim.name}
    for section in ("model", "quant"):
        for key, value in asdict(getattr(config, section)).items():
            identity[f"{section}.{key}"] = value
    identity["data.sequence_length"] = sequence_length
    identity["the tokenizer"] = None if tokenizer is None else tokenizer.sha256
    identity |= data
    return {key: value for key, value in identity.items() if key not in _FREE}


def check_identity(saved: dict[str, Any], now: dict[str, Any], resume: str) -> None:
    """Compare the mapping of a checkpoint with the one of the run that goes on from it.

    Raises:
        UserError: they differ; it names what changed.
    """
    # A key that the checkpoint does not have came with a later version; a shard that it does not have is another shard.
    compared = [*saved, *(key for key in now if key not in saved and key.startswith("the shard"))]
    changed = [key for key in compared if saved.get(key) != now.get(key)]
    if not changed:
        return
    data = [key for key in changed if key.startswith("the ")]
    key = (data or changed)[0]
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    if data:
        what = f"{key} in data.dir is not the one that the run began with{more}: give data.dir=<the folder as it was>"
    else:
        what = f"{key} was {saved.get(key)} when the run began, and is {now.get(key)} now{more}: leave it as it was"
    raise UserError(f"resume={resume}: {what}, or start another run with init_from={resume}")
