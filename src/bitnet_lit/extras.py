"""Packages that only some commands need. Where one is not installed, a line says what needs it and how to get it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from bitnet_lit.errors import UserError

EXTRAS = {
    "gguf": "export",
    "huggingface_hub": "export",
    "matplotlib": "plot",
    "tensorboard": "tensorboard",
    "tokenizers": "export",
}
"""Package -> the extra of pyproject.toml that brings it."""


def installed(*packages: str) -> bool:
    """Whether all of these packages are installed; none is imported."""
    return all(importlib.util.find_spec(package) for package in packages)


@contextlib.contextmanager
def needs(package: str, what: str) -> Iterator[None]:
    """Around the import of a package that may be missing.

    Args:
        package: its name on PyPI.
        what: the option that needs it, such as "format=gguf".

    Raises:
        UserError: it is not installed.
    """
    try:
        yield
    except ImportError:
        extra = f", or pip install 'bitnet-lit[{EXTRAS[package]}]'" if package in EXTRAS else ""
        raise UserError(f"{what}: needs the package {package}: pip install {package}{extra}") from None
