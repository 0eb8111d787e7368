"""Some commands need optional packages. Where one is missing, one line says what needs it and how to install it."""

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
"""Package -> the extra of pyproject.toml that installs it."""


def installed(*packages: str) -> bool:
    """Return whether all of these packages are installed, without importing them."""
    return all(importlib.util.find_spec(package) for package in packages)


@contextlib.contextmanager
def needs(package: str, what: str) -> Iterator[None]:
    """Report a missing package in one line when the block imports it.

    Args:
        package: its name on PyPI.
        what: the option that needs it, such as "format=gguf".

    Raises:
        UserError: the package is not installed.
    """
    try:
        yield
    except ImportError:
        extra = f", or pip install 'bitnet-lit[{EXTRAS[package]}]'" if package in EXTRAS else ""
        raise UserError(f"{what}: needs the package {package}: pip install {package}{extra}") from None
