"""This package defines 1.58-bit quantization. It can be read without the model.

A scheme says how weights and activations are rounded (`scheme.py`); `schemes.py` has the built-in ones. A scheme is
made of two rules, one for weights (`weights.py`) and one for activations (`activations.py`). `bit_linear.py` has the
layer that is trained, `packing.py` its frozen form for inference, and `convert.py` the pass that puts these layers into
any network.

The layers need torch and the schemes do not. So a name is imported when it is first used, and a command that only reads
a model folder does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet_lit.config import QuantConfig
    from bitnet_lit.quant.bit_linear import BitLinear
    from bitnet_lit.quant.convert import convert_linears, pack_linears, uncalled_linears
    from bitnet_lit.quant.packing import PackedBitLinear
    from bitnet_lit.quant.scheme import Scheme
    from bitnet_lit.quant.schemes import register, scheme_named

__all__ = [
    "BitLinear",
    "PackedBitLinear",
    "QuantConfig",
    "Scheme",
    "convert_linears",
    "pack_linears",
    "register",
    "scheme_named",
    "uncalled_linears",
]
_HOMES = {
    "BitLinear": "bitnet_lit.quant.bit_linear",
    "PackedBitLinear": "bitnet_lit.quant.packing",
    "QuantConfig": "bitnet_lit.config",
    "Scheme": "bitnet_lit.quant.scheme",
    "convert_linears": "bitnet_lit.quant.convert",
    "pack_linears": "bitnet_lit.quant.convert",
    "register": "bitnet_lit.quant.schemes",
    "scheme_named": "bitnet_lit.quant.schemes",
    "uncalled_linears": "bitnet_lit.quant.convert",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
