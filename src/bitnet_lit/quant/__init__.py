"""The definition of 1.58 bit, readable without the model.

`functional` is the mathematics, `bit_linear` the layer, `packing` its frozen form, `convert` the pass that swaps
layers in any network.
"""

from bitnet_lit.config import QuantConfig
from bitnet_lit.quant.bit_linear import BitLinear
from bitnet_lit.quant.convert import convert_linears, pack_linears, uncalled_linears
from bitnet_lit.quant.packing import PackedBitLinear

__all__ = ["BitLinear", "PackedBitLinear", "QuantConfig", "convert_linears", "pack_linears", "uncalled_linears"]
