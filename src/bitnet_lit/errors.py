"""The one exception that speaks to users.

A `UserError` is a mistake on the command line, in a config or in a file: one line that says what is wrong, the
value seen and what to do. Doors print that line and exit with status 2; everything else that escapes is a bug of
ours and keeps its traceback (status 1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """What is wrong, the value seen, the remedy: in one line."""


class TrainingStopped(RuntimeError):
    """A run that ended early on purpose: diverged, or asked to stop by a signal. Carries the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def needs_extra(package: str, what: str) -> Iterator[None]:
    """Around the import of an optional package: where it is missing, say what needs it and how to get it."""
    try:
        yield
    except ImportError:
        raise UserError(
            f"{what}: needs the package {package}: pip install {package}, or all of them: pip install "
            "'bitnet-lit[export]'"
        ) from None


class ParityError(RuntimeError):
    """An exported artefact that is not the model it was written from; nothing is left of it. Status 1."""
