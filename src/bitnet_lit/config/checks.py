"""Checks of single values; each says the key, the value and what it must be."""

from __future__ import annotations

from bitnet_lit.errors import UserError


def positive(owner: str, **values: float | None) -> None:
    for key, value in values.items():
        if value is not None and value <= 0:
            raise UserError(f"{owner}.{key}={value}: must be greater than zero")


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value}: must be one of {', '.join(allowed)}")
