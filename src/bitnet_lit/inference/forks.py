"""Forks and torch: importing this module keeps torch usable in the child.

torch computes on OpenMP's threads. A fork copies one thread alone, and the first loop that the child divides waits for
the others for ever. So the child takes one thread, as torch's own worker processes of a DataLoader do. The native
engine needs nothing of the kind: it starts threads of its own again (engines.h).
"""

from __future__ import annotations

import os
import sys


def _in_child() -> None:
    torch = sys.modules.get("torch")
    if torch and hasattr(torch, "set_num_threads"):  # neither absent nor half imported
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_in_child)
