"""The learning rate and the weight decay are pure functions of the optimizer step.

All three schedules begin with a linear warm-up of the learning rate.

`cosine`      The rate falls along half a cosine to `final_factor` of the peak, as in llama2.c.
`two_stage`   The rate falls linearly. At `switch_at` it drops to `second_stage_factor` of its value and goes on
              falling, and weight decay ends. A large rate lets ternary codes flip early; small steps without decay let
              them settle (BitNet's Training Tips, section 2). The loss falls again after the switch, so do not stop
              before it.
`wsd`         The rate stays at its peak and falls linearly over the last `decay_share` of the run.

Weight decay is constant, or falls linearly to 0 over the run (`schedule.weight_decay=to_zero`).

The curve depends only on (step, total_steps), so a resumed run follows the same curve. A run that is resumed with
another length would change its curve, so `resume.py` refuses that unless `schedule.total_steps` is given.

A schedule of the user's own (`schedule._target_`) is such a function, or a PyTorch scheduler, whose state is kept in
the checkpoint.
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
    """Return the learning rate at an optimizer step as a share of its peak, in [0, 1].

    Args:
        step: the optimizer step; 0 is the first.
        warmup_steps: steps over which the rate rises linearly to its peak.
        total_steps: steps of the whole curve, warm-up included.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    final = schedule.final_factor
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))  # 0 after the warm-up, 1 at the end
    if schedule.name == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    if schedule.name == "two_stage":
        peak = 1.0 if step < schedule.switch_at * total_steps else schedule.second_stage_factor
        return max(final, peak * (1 - progress))
    assert schedule.name == "wsd", schedule.name
    decay_steps = max(1, round(schedule.decay_share * total_steps))
    return max(final, min(1.0, (total_steps - step) / decay_steps))


def weight_decay_factor(step: int, schedule: ScheduleConfig, total_steps: int) -> float:
    """Return the weight decay at an optimizer step as a share of the configured one.

    The share is 0 in the second stage of `two_stage`. Elsewhere it is 1, or with `weight_decay=to_zero` the share of
    the run that is left.
    """
    if schedule.name == "two_stage" and step >= schedule.switch_at * total_steps:
        return 0.0
    return max(0.0, 1 - step / total_steps) if schedule.weight_decay == "to_zero" else 1.0


class Schedule(LambdaLR):
    """Sets the learning rate and the weight decay of every parameter group after each optimizer step.

    Args:
        rate: maps an optimizer step to a factor of the peak learning rate.
        decay: maps an optimizer step to a factor of the configured weight decay.
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
        """Return only the step; everything else comes from the config."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a saved step. The state of the optimizer already holds the learning rates of that step."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1


def build_schedule(
    optimizer: Optimizer, config: ScheduleConfig | CustomSchedule, warmup_steps: int, total_steps: int
) -> LRScheduler:
    """Return the schedule of `config`, which must be stepped once per optimizer step.

    Args:
        warmup_steps: optimizer steps of the warm-up.
        total_steps: optimizer steps of the whole curve, warm-up included.

    Raises:
        UserError: a class of the user's own cannot be made, or is no schedule.
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
                f"schedule._target_={config._target_}: depends on validations, and a resumed run does not "
                "repeat them: take a schedule that follows the step"
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
