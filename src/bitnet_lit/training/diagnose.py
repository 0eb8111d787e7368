"""When a loss or a gradient is no longer finite, these functions find the layer where that happened first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitnet_lit.training.compile import not_compiled
from bitnet_lit.training.sharing import local


def first_nonfinite_output(model: nn.Module, ids: Tensor) -> str | None:
    """Return the name of the first leaf module whose output holds an inf or a NaN, or None if there is none.

    Modules are compared in the order of the forward pass.

    Args:
        ids: int64 (B, T), the batch that went wrong. It is run once more, without gradients.
    """
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:

            def hook(_: nn.Module, __: object, output: object, name: str = name) -> None:
                if not found and isinstance(output, Tensor) and not output.isfinite().all():
                    found.append(name)

            handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad(), not_compiled():  # a compiled network does not call its parts one by one
            model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients by the names of their parameters; under FSDP2 the rows that this rank has."""
    return {name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def last_nonfinite_gradient(model: nn.Module) -> str | None:
    """Return the name of the last parameter, in definition order, whose gradient is not finite, or None.

    The backward pass runs from the last layer to the first, so this gradient went wrong first.
    """
    names = [name for name, gradient in _gradients(model).items() if not gradient.isfinite().all().item()]
    return names[-1] if names else None


def largest_gradient(model: nn.Module) -> str | None:
    """Return the name of the parameter with the largest element in its gradient, or None where no gradient exists."""
    sizes = {name: float(gradient.abs().max()) for name, gradient in _gradients(model).items() if gradient.numel()}
    return max(sizes, key=sizes.__getitem__, default=None)
