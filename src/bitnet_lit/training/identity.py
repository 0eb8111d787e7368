"""The identity of a run is what must stay the same when the run is resumed.

The network's sizes and rules, the seed, the length of a sequence, the shards and their tokenizer decide what the
weights mean and which tokens come next. The teacher of a distillation decides what is learned. Each checkpoint holds
all of them as one flat mapping of plain values. A resume compares the mapping, and so finds a config.yaml that was
edited and shards that were prepared again.

For each shard the mapping holds the size and a hash of a few blocks. That finds another text or another tokenizer, and
reads only about a megabyte per shard.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bitnet_lit.config import ModelConfig, TrainConfig
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError

# These do not change what the weights mean, so a resume may change them.
_FREE = {
    "model.name",
    *(f"model.{key}" for key in ModelConfig.TRAINING),
    "quant.lambda_warmup_steps",
    "quant.lambda_warmup_shape",
    "quant.kernel",
    "quant.grad",
    "quant._target_",  # only where a scheme's class is defined; its name and its settings are compared
}

SHARD = "the shard "  # in front of `<corpus>/<file name>`, or of the file name alone
_TEACHER = "distill.teacher's sha256"


def shard_digests(identity: dict[str, Any]) -> list[dict[str, str]]:
    """Return the digest of each shard by its file name, for each corpus that a run was trained on."""
    corpora: dict[str, dict[str, str]] = {}
    for key, digest in identity.items():
        if key.startswith(SHARD):
            corpus, _, name = key.removeprefix(SHARD).rpartition("/")
            corpora.setdefault(corpus, {})[name] = digest
    return list(corpora.values())


def run_identity(
    config: TrainConfig,
    data: dict[str, Any],
    tokenizer: Tokenizer | None,
    sequence_length: int,
    teacher: str | None = None,
) -> dict[str, Any]:
    """Return the identity of a run: a flat mapping from keys to plain values.

    Args:
        config: the config with every value filled in.
        data: the facts about the data (`RunData.identity`).
        sequence_length: tokens that a sequence predicts.
        teacher: the hash of the teacher's weights; None where there is none, and on a rank that has not computed it.
    """
    identity: dict[str, Any] = {"seed": config.seed, "optim.name": config.optim.name}
    for section in ("model", "quant"):
        for key, value in asdict(getattr(config, section)).items():
            identity[f"{section}.{key}"] = value
    identity["data.sequence_length"] = sequence_length
    identity["the tokenizer"] = None if tokenizer is None else tokenizer.sha256
    identity[_TEACHER] = teacher
    identity |= data
    return {key: value for key, value in identity.items() if key not in _FREE}


def check_identity(saved: dict[str, Any], now: dict[str, Any], resume: str, has_hashed: bool = True) -> None:
    """Compare the identity in a checkpoint with the identity of the run that goes on from it.

    Args:
        has_hashed: whether this rank has computed the hash of the teacher. One rank of a node does it for the others.

    Raises:
        UserError: they differ. The text names what changed.
    """
    if "quant.start_at" in now:
        saved = {"quant.start_at": 0.0, **saved}  # earlier versions quantized from the first step
    if any(key.startswith(SHARD) for key in saved):
        saved = {"data.shuffle": "global", **saved}  # the only order before there was this key
    saved = {_TEACHER: None, **saved}  # no run had one before there was this key
    # A key that the checkpoint lacks was added by a later version, unless it is a shard: then the data has changed.
    saved = saved if has_hashed else saved | {_TEACHER: now[_TEACHER]}
    compared = [*saved, *(key for key in now if key not in saved and key.startswith(SHARD))]
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
