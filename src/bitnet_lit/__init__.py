"""Train, study and ship 1.58-bit language models.

::

    import bitnet_lit
    model = bitnet_lit.load("outputs/.../model")
    print(model.generate("Once upon a time", max_new_tokens=100))

Importing this package imports nothing heavy: torch comes with the model, and Hydra and Lightning come only with the
commands that train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitnet_lit.errors import ModelError, UserError
    from bitnet_lit.inference.language_model import LanguageModel, load

__all__ = ["LanguageModel", "ModelError", "UserError", "load"]
__version__ = "0.1.0"

if not TYPE_CHECKING:  # hidden from type checkers: with it they would take any name for one of the package

    def __getattr__(name: str) -> object:
        from importlib import import_module

        modules = {"UserError": "errors", "ModelError": "errors"}
        if name not in __all__:
            raise AttributeError(f"module 'bitnet_lit' has no attribute {name!r}")
        return getattr(import_module(f"bitnet_lit.{modules.get(name, 'inference.language_model')}"), name)

    def __dir__() -> list[str]:
        return [*__all__, "__version__"]
