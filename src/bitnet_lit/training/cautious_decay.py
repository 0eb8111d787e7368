"""Cautious weight decay acts only on the weights that a step moves towards zero (Chen et al. 2025, arXiv 2510.12402).

With an update u, a weight w, a learning rate r and weight decay d, a step is ::

    w <- w - r (u + d w)                            # decoupled weight decay, as in AdamW and Muon
    w <- w - r (u + d w [u w >= 0])                 # cautious

Where u and w have opposite signs, the gradient wants a larger weight, and decay would work against it. So weight decay
no longer pulls the optimum towards zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from bitnet_lit.training.sharing import local


def decay_where_agreed(weights: Sequence[Tensor], updates: Sequence[Tensor], kept: float | Tensor) -> None:
    """Multiply weights by `kept`, in place, where they agree in sign with their update, which is subtracted later.

    Args:
        updates: of the shapes of `weights`, in any dtype. Where one is not finite, `kept` must be 1.
        kept: 1 - learning rate * weight decay; a tensor () on the device of the weights lets nobody wait for it.
    """
    for weight, update in zip(weights, updates, strict=True):
        weight.mul_(torch.where(update * weight >= 0, kept, 1.0))


class CautiousAdamW(AdamW):
    """Runs `torch.optim.AdamW`, fused where that is, with cautious weight decay. State and options are the same.

    AdamW divides the mean of the gradients by a positive root, so that mean has the sign of the update.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one optimizer step. `closure` is called first, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            self._decay(group)
            group["weight_decay"] = 0.0
        # PyTorch wraps the `step` of every class whose optimizers are made, to call hooks. Ours is wrapped already.
        plain: Callable[[AdamW], Any] = AdamW.step
        if getattr(plain, "hooked", False):
            plain = plain.__wrapped__  # type: ignore[attr-defined]  # by functools.wraps
        try:
            plain(self)
        finally:
            for group, weight_decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = weight_decay
        return loss

    def _decay(self, group: dict[str, Any]) -> None:
        lost: float | Tensor = group["lr"] * group["weight_decay"]
        if not lost:
            return
        if (found_inf := getattr(self, "found_inf", None)) is not None:  # the step changes nothing where it is 1
            lost = lost * (1 - found_inf)
        kept = 1 - lost
        for parameter in group["params"]:
            if parameter.grad is not None:
                update = local(parameter.grad)
                if (average := self.state[parameter].get("exp_avg")) is not None:
                    update = local(average).lerp(update, 1 - group["betas"][0])
                decay_where_agreed([local(parameter)], [update], kept)
