"""A run diverges when its loss or gradient is no longer finite. `Divergence` notices it without waiting for the device.

Reading one number from a GPU stops the host until the GPU has done all of its work, and then the GPU waits for the
host. So the norm of each gradient is tested on the device, and the answer is read only when figures are logged, before
a validation, and before a checkpoint is written. Until then every later optimizer step does nothing: `found_inf` is how
PyTorch's gradient scaler tells an optimizer to skip a step, also on the device. So the weights stay those before the
bad step, no checkpoint holds others, and the layer that failed can still be found.

Where reading costs nothing (a CPU), or where the optimizer has no `found_inf`, `check_step` reads the norm before each
step, and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bitnet_lit.errors import Diverged
from bitnet_lit.training.compile import not_compiled
from bitnet_lit.training.diagnose import first_nonfinite_output, largest_gradient, last_nonfinite_gradient
from bitnet_lit.training.sharing import first_of_ranks


def skips_on_device(optimizer: Optimizer) -> bool:
    """Return whether a step of the optimizer does nothing where its attribute `found_inf` is 1."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class Divergence:
    """Keeps whether the run has diverged, and the batch and the figures of the first step that did.

    Attributes:
        found_inf: float32 (), 1 from the first norm on that is not finite, before that 0. None before the first step.
    """

    def __init__(self) -> None:
        self.found_inf: Tensor | None = None
        self._figures: Tensor | None = None  # float32 (3,): step, loss, norm; of the first bad step once there is one
        self._batch: Tensor | None = None

    def note(self, step: int, loss: Tensor, norm: Tensor, batch: Tensor) -> None:
        """Test an optimizer step. It is a few small operations on the device.

        Args:
            step: number of steps before this one.
            loss: float32 (), of the step.
            norm: float32 (), the norm of the gradient.
            batch: int64 (B, T + 1), the last batch of the step.
        """
        norm = norm.float()
        figures = torch.stack([torch.full_like(norm, step), loss.float(), norm])
        if self.found_inf is None or self._figures is None or self._batch is None:
            self.found_inf, self._figures, self._batch = torch.zeros_like(norm), figures, batch.clone()
        else:
            had_diverged = self.found_inf.bool()
            self._figures = torch.where(had_diverged, self._figures, figures)
            if self._batch.shape == batch.shape:
                self._batch = torch.where(had_diverged, self._batch, batch)
            else:  # the device cannot choose between two shapes, so `check` may look for the place in a later batch
                self._batch = batch.clone()
        # x - x is NaN where x is not finite, and 0 elsewhere: `isfinite` takes twice as many operations.
        torch.maximum(self.found_inf, (norm - norm).ne(0), out=self.found_inf)  # a recorded step reads it there

    def check(self, model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> None:
        """Read the result, which waits for the device.

        Args:
            model: has the weights before the first bad step.
            loss_of: returns the loss in training of a batch.

        Raises:
            Diverged: a step was bad. The text names the step and the layer.
        """
        if self.found_inf is None or not self.found_inf.item():
            return
        assert self._figures is not None and self._batch is not None
        step, loss, norm = self._figures.tolist()
        raise _diverged(int(step), loss, norm, _where(model, self._batch, loss_of))


def check_step(model: nn.Module, step: int, loss: Tensor, norm: Tensor, batch: Tensor) -> None:
    """Read the norm of the gradient, which waits for the device.

    Args:
        model: holds the gradients of the step, and the weights before it.
        step, loss, norm, batch: those of `Divergence.note`.

    Raises:
        Diverged: the step is bad.
    """
    if not norm.isfinite():
        raise _diverged(step, loss.item(), norm.item(), _where(model, batch, None))


def _diverged(step: int, loss: float, norm: float, what: str) -> Diverged:
    return Diverged(f"step {step}: {what} (loss {loss:.4g}, gradient norm {norm:.4g}): lower optim.learning_rate")


def _where(model: nn.Module, batch: Tensor, loss_of: Callable[[Tensor], Tensor] | None) -> str:
    """Return what is not finite. Where `loss_of` is given, the gradients of the batch are computed first."""
    # The ranks have other batches, and under FSDP2 they must go through the network together.
    if layer := first_of_ranks(first_nonfinite_output(model, batch[:, :-1])):
        return f"the output of {layer} is not finite"
    if loss_of is not None:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad(), not_compiled():
            loss_of(batch).backward()
    if parameter := first_of_ranks(last_nonfinite_gradient(model)):
        return f"the gradient of {parameter} is not finite"
    # Every gradient is finite, but the sum of their squares overflows.
    return f"the norm of the gradient is not finite (the largest is that of {largest_gradient(model)})"
