"""Where a number stopped being one: the first layer whose output, or whose gradient, is not finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def first_nonfinite_output(model: nn.Module, ids: Tensor) -> str | None:
    """Name of the first leaf module, in the order of the forward pass, whose output holds an inf or a NaN.

    Args:
        ids: int64 (B, T), the batch that went wrong; it is run once more, without gradients.
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
        with torch.no_grad():
            model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def last_nonfinite_gradient(model: nn.Module) -> str | None:
    """Name of the last parameter, in definition order, whose gradient is not finite.

    The backward pass runs from the end to the start, so the last one is where it went wrong first.
    """
    names = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all().item()]
    return names[-1] if names else None


def largest_gradient(model: nn.Module) -> str | None:
    """Name of the parameter with the largest element in its gradient; None where there is no gradient."""
    sizes = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    return max(sizes, key=sizes.__getitem__, default=None)
