"""Learning rate and weight decay as pure functions of the step.

`cosine`      warm up, then half a cosine to `final_factor`: llama2.c's.
`two_stage`   BitNet's: linear decay; at `switch_at` the rate drops at once to `second_stage_factor` of where the
              first stage was heading and goes on falling, and weight decay ends. Large latent weights let codes
              flip early; small steps without decay let them settle (Training Tips, section 2). The loss falls again
              after the switch: do not stop early.
`wsd`         warm up, stay, decay linearly over the last `decay_share`.

Because the curve is a function of (step, total_steps), a resumed run follows the same curve, and a run that is
resumed with another length would move its switch: the run says so instead.

A schedule of the user's own (`schedule._target_`) is such a function, or a scheduler of PyTorch, whose state is kept
in the checkpoint.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from bitnet_lit.config import CustomSchedule, ScheduleConfig
from bitnet_lit.errors import UserError
from bitnet_lit.instantiate import instantiate, locate, takes


def learning_rate_factor(step: int, schedule: ScheduleConfig, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (0 is the first), in [0, 1]."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    final = schedule.final_factor
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))  # of what follows the warm-up
    if schedule.name == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    if schedule.name == "two_stage":
        peak = 1.0 if step < schedule.switch_at * total_steps else schedule.second_stage_factor
        return max(final, peak * (1 - progress))
    assert schedule.name == "wsd", schedule.name
    decay_steps = max(1, round(schedule.decay_share * total_steps))
    return max(final, min(1.0, (total_steps - step) / decay_steps))


def weight_decay_factor(step: int, schedule: ScheduleConfig, total_steps: int) -> float:
    """Share of the configured weight decay at optimizer step `step`: 1, or 0 in the second stage of two_stage."""
    return 0.0 if schedule.name == "two_stage" and step >= schedule.switch_at * total_steps else 1.0


class Schedule(LambdaLR):
    """Applies both factors to every parameter group after each optimizer step.

    Args:
        rate: the factor of the peak learning rate at an optimizer step.
        decay: the factor of the weight decay at an optimizer step.
    """

    def __init__(self, optimizer: Optimizer, rate: Callable[[int], float], decay: Callable[[int], float]) -> None:
        self._decay = decay
        self._weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        super().__init__(optimizer, rate)

    def step(self, epoch: int | None = None) -> None:
        """Move to the next step, or to step `epoch`."""
        super().step(epoch)
        factor = self._decay(self.last_epoch)
        for group, weight_decay in zip(self.optimizer.param_groups, self._weight_decays, strict=True):
            group["weight_decay"] = weight_decay * factor

    def state_dict(self) -> dict:
        """The step alone: everything else comes from the config."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a saved step; the optimizer's own state already holds the rates that belong to it."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1


def build_schedule(
    optimizer: Optimizer, config: ScheduleConfig | CustomSchedule, warmup_steps: int, total_steps: int
) -> LRScheduler:
    """The schedule of `config`, which is stepped once per optimizer step.

    Raises:
        UserError: a class of the user's own that cannot be made, or is no schedule.
    """
    if isinstance(config, CustomSchedule):
        return _custom_schedule(optimizer, config, warmup_steps, total_steps)
    return Schedule(
        optimizer,
        lambda step: learning_rate_factor(step, config, warmup_steps, total_steps),
        lambda step: weight_decay_factor(step, config, total_steps),
    )


def _custom_schedule(optimizer: Optimizer, config: CustomSchedule, warmup_steps: int, total_steps: int) -> LRScheduler:
    target: Any = locate(config._target_, "schedule")
    lengths = {"warmup_steps": warmup_steps, "total_steps": total_steps}
    for name in ("warmup_steps", "warmup_tokens"):
        if getattr(config, name) is not None and not takes(target, "warmup_steps"):
            raise UserError(f"schedule.{name}={getattr(config, name)}: {config._target_} has no argument warmup_steps")
    lengths = {name: value for name, value in lengths.items() if takes(target, name)}
    if inspect.isclass(target) and issubclass(target, LRScheduler):
        if issubclass(target, ReduceLROnPlateau):
            raise UserError(
                f"schedule._target_={config._target_}: follows a validation, which a resumed run would not "
                "repeat: take a schedule that follows the step"
            )
        return instantiate(config.call, "schedule", optimizer, **lengths)
    if inspect.isclass(target):
        factor = instantiate(config.call, "schedule", **lengths)
    else:
        factor = instantiate({**config.call, "_partial_": True}, "schedule", **lengths)
    try:
        first = factor(0)
    except Exception as error:  # whatever the user's function raises
        raise UserError(
            f"schedule._target_={config._target_}: cannot be called with a step ({type(error).__name__}: {error})"
        ) from error
    if isinstance(first, bool) or not isinstance(first, int | float) or not math.isfinite(first):
        raise UserError(
            f"schedule._target_={config._target_}: gives {first!r} for step 0: it must give the factor of the learning "
            "rate for each optimizer step, a number"
        )
    return Schedule(optimizer, factor, lambda step: 1.0)
