"""Some commands need optional packages. Where one is missing, one line says what needs it and how to install it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from bitnet_lit.errors import UserError, one_line

EXTRAS = {
    "gguf": "export",
    "huggingface_hub": "export",
    "lm_eval": "eval",
    "matplotlib": "plot",
    "pyarrow": "data",
    "plotly": "report",
    "optuna": "sweep",
    "tensorboard": "tensorboard",
    "tokenizers": "export",
    "zstandard": "data",
}
"""Package -> the extra of pyproject.toml that installs it."""


def installed(*packages: str) -> bool:
    """Return whether all of these packages are installed, without importing them."""
    return all(importlib.util.find_spec(package) for package in packages)


@contextlib.contextmanager
def needs(package: str, what: str) -> Iterator[None]:
    """Report a package that is missing, or that cannot be imported, in one line when the block imports it.

    Args:
        package: its name on PyPI.
        what: the option that needs it, such as "format=gguf".

    Raises:
        UserError: the package is not installed, or its import fails.
    """
    try:
        yield
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and (error.name or package).partition(".")[0] == package
        if not is_missing:
            raise UserError(f"{what}: the package {package} cannot be imported ({one_line(error)}): mend it") from error
        extra = f", or pip install 'bitnet-lit[{EXTRAS[package]}]'" if package in EXTRAS else ""
        raise UserError(f"{what}: needs the package {package}: pip install {package}{extra}") from None
