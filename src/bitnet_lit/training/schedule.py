"""Learning rate and weight decay as pure functions of the step.

`cosine`      warm up, then half a cosine to `final_factor`: llama2.c's.
`two_stage`   BitNet's: linear decay; at `switch_at` the rate drops at once to `second_stage_factor` of where the
              first stage was heading and goes on falling, and weight decay ends. Large latent weights let codes
              flip early; small steps without decay let them settle (Training Tips, section 2). The loss falls again
              after the switch: do not stop early.
`wsd`         warm up, stay, decay linearly over the last `decay_share`.

Because the curve is a function of (step, total_steps), a resumed run follows the same curve, and a run that is
resumed with another length would move its switch: the run says so instead.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from bitnet_lit.config import ScheduleConfig


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
    """Applies both factors to every parameter group after each optimizer step."""

    def __init__(self, optimizer: Optimizer, schedule: ScheduleConfig, warmup_steps: int, total_steps: int) -> None:
        self._schedule, self._total_steps = schedule, total_steps
        self._weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        super().__init__(optimizer, lambda step: learning_rate_factor(step, schedule, warmup_steps, total_steps))

    def step(self, epoch: int | None = None) -> None:
        """Move to the next step, or to step `epoch`."""
        super().step(epoch)
        factor = weight_decay_factor(self.last_epoch, self._schedule, self._total_steps)
        for group, weight_decay in zip(self.optimizer.param_groups, self._weight_decays, strict=True):
            group["weight_decay"] = weight_decay * factor

    def state_dict(self) -> dict:
        """The step alone: everything else comes from the config."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a saved step; the optimizer's own state already holds the rates that belong to it."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
