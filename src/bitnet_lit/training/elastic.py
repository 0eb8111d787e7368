"""A run that goes on with another number of ranks keeps the sequences of an optimizer step.

The order of samples is a function of the seed and of how many were consumed, and a step takes the next G of them, where

    G = data.batch_size x trainer.accumulate_grad_batches x ranks

So with the same G the run reads the same samples in the same steps, its lengths in steps are the same tokens, and its
learning rates fit. On resume the batch of a rank and the batches that it accumulates change to keep G. Weights and
moments of a checkpoint are whole, so each rank takes its part of them. What differs is the order in which gradients are
summed, which rounds their last bits differently.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from bitnet_lit.config import CustomData, TrainConfig
from bitnet_lit.errors import UserError
from bitnet_lit.training.plan import world_size

BATCH, ACCUMULATION = "data.batch_size", "trainer.accumulate_grad_batches"


def keep_step(config: TrainConfig, sequences: int | None, typed: Collection[str]) -> TrainConfig:
    """Return the config of a resumed run whose number of ranks has changed, with the same sequences in a step.

    A key that the user typed stays, and so does the batch of a data module of the user's own, whose state counts
    batches. The batch of a rank never becomes larger, because it might not fit into the device's memory.

    Args:
        sequences: G, the sequences of a step so far; None where the checkpoint does not say, and nothing changes.
        typed: keys that the user typed.

    Raises:
        UserError: the ranks cannot share that many sequences equally.
    """
    if sequences is None:
        return config
    batch, batches, ranks = config.data.batch_size, config.trainer.accumulate_grad_batches, world_size(config.trainer)
    if batch * batches * ranks == sequences or {BATCH, ACCUMULATION} <= set(typed):
        return config
    each, left = divmod(sequences, ranks)
    divisors = [size for size in range(1, each + 1) if each % size == 0]
    if BATCH in typed or isinstance(config.data, CustomData):
        fitting, fixed = [size for size in divisors if size == batch], f"{BATCH}={batch}"
    elif ACCUMULATION in typed:
        fitting, fixed = [size for size in divisors if size * batches == each], f"{ACCUMULATION}={batches}"
    else:
        fitting, fixed = [size for size in divisors if size <= batch], ""
    if left or not fitting:
        raise UserError(
            f"resume={config.resume}: its steps have {sequences} sequences, which {ranks} ranks cannot share"
            f"{f' with {fixed}' if fixed else ''}: take a number of ranks that divides them, or give {BATCH} and "
            f"{ACCUMULATION} for steps of another size"
        )
    return replace(
        config,
        data=replace(config.data, batch_size=fitting[-1]),
        trainer=replace(config.trainer, accumulate_grad_batches=each // fitting[-1]),
    )
