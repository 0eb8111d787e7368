"""The one exception that speaks to users.

A `UserError` is a mistake on the command line, in a config or in a file: one line that says what is wrong, the
value seen and what to do. Doors print that line and exit with status 2; everything else that escapes is a bug of
ours and keeps its traceback (status 1).
"""

from __future__ import annotations


class UserError(ValueError):
    """What is wrong, the value seen, the remedy: in one line."""


class TrainingStopped(RuntimeError):
    """A run that ended early on purpose: diverged, or asked to stop by a signal. Carries the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
