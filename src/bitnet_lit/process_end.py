"""A process can end without the destructors of C++ libraries, where those would abort it or wait for long."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave_at_once(status: int) -> NoReturn:
    """Write what the standard streams still hold, and end the process; nothing else of it is cleaned up."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # full, or closed
            status = status or 1
    os._exit(status)
