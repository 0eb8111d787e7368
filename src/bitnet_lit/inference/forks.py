"""Importing this module lets a forked child process compute with torch.

torch divides loops among OpenMP's threads. A fork copies only the thread that calls it, so the first loop that the
child divides would wait for threads that are not there, for ever. With one thread there is nothing to divide; torch's
own DataLoader workers do the same. The native engine starts its threads again by itself (csrc/).
"""

from __future__ import annotations

import os
import sys


def _use_one_thread() -> None:
    torch = sys.modules.get("torch")
    if torch and hasattr(torch, "set_num_threads"):  # it may be imported halfway
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_use_one_thread)
