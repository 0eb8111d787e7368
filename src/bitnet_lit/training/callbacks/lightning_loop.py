"""Lightning's loop validates outside of its interval, and counts anew where a run goes on. `Checkpoints` says when.

Lightning has no public function for either. All that changes the counters of its loop stands in this file.
"""

from __future__ import annotations

from typing import Any

import lightning as L


def validation_is_due(trainer: L.Trainer) -> bool:
    """Return whether the interval between validations ends with the last batch."""
    batches, interval = trainer.fit_loop.epoch_loop.total_batch_idx + 1, trainer.val_check_batch
    return interval is not None and batches > 0 and batches % interval == 0


def validate_now(trainer: L.Trainer) -> None:
    """Run a missing validation between two batches."""
    loop, done = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.batch_progress
    # The checkpoint may have been written before Lightning counted the last batch as completed. It is counted for
    # the validation, and taken back afterwards, because Lightning counts it when it goes on with the next batch.
    is_uncounted = done.current.completed < done.current.processed  # type: ignore[attr-defined]
    if is_uncounted:
        done.increment_completed()
    trainer.validating = True
    loop.val_loop.restarting = False
    loop.val_loop.run()
    trainer.training = True
    if is_uncounted and not trainer.should_stop:
        done.current.completed -= 1
        done.total.completed -= 1


def validate_after_end(trainer: L.Trainer) -> None:
    """Validate after the last step, which Lightning has already counted."""
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped -= 1  # loggers read it as the step
    validate_now(trainer)
    loop._batches_that_stepped += 1


def count_step_of_validation(trainer: L.Trainer) -> None:
    """Count the step of a restored checkpoint that was written after a validation outside the interval.

    Lightning had not counted the step yet, and on resume it counts a step only where a regular validation is due.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def count_batches(checkpoint: dict[str, Any], accumulate_grad_batches: int) -> None:
    """Move the counters of batches in a checkpoint to what they would be if the run had begun as it goes on.

    It may go on with other batches, on another number of ranks. Otherwise its next optimizer step would have too few
    batches.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counters in (progress["total"], progress["current"]):
        missing = checkpoint["global_step"] * accumulate_grad_batches - counters["processed"]
        counters.update({name: count + missing for name, count in counters.items()})
