"""Train, study and ship 1.58-bit language models.

::

    import bitnet_lit
    model = bitnet_lit.load("outputs/.../model")
    print(model.generate("Once upon a time", max_new_tokens=100))

Importing this package imports nothing heavy: torch comes with `load`, Hydra and Lightning only with the doors that
train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet_lit.inference.load import load

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from bitnet_lit.inference.load import load

        return load
    raise AttributeError(f"module 'bitnet_lit' has no attribute {name!r}")
