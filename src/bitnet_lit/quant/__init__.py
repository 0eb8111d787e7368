"""The definition of 1.58 bit, readable without the model.

`scheme` is the object that everyone asks, `schemes` are those that there are, `weights` and `activations` are the rules
that a scheme is made of, `bit_linear` is the layer, `packing` its frozen form, `convert` the pass that swaps layers in
any network.

Layers need torch and schemes do not, so a name is imported when it is asked for: whoever wants to know what a model
folder holds does not wait for torch.
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
