"""A kernel may start before the one before it has ended (kernels/__init__.py says what for)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def early(device: torch.device) -> dict[str, Any]:
    """Return the launch options of a kernel on a GPU; Hopper is the first that can start kernels early."""
    can = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if can else {"PDL": False}
