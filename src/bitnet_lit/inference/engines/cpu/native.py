"""The compiled engine from Python: its structures, and one `ctypes` function for each function of csrc/engine.cpp."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from bitnet_lit.native import build

ENGINE = build.Source("engine", Path(__file__).parent / "csrc" / "engine.cpp")

DONE, NO_MEMORY, SHORT_READ = range(3)  # `enum Status` of engine.cpp

VECTORS = {
    "value_gate": "self_attn.value_embed.gate",
    "residual_scale": "residual_scale",
    "x0_scale": "x0_scale",
    "input_norm": "input_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "attn_norm": "self_attn.attn_sub_norm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "ffn_norm": "mlp.ffn_sub_norm.weight",
}
"""The small tensors of `Layer`: its field, and the tensor's name within a decoder layer."""
VALUE_TABLE = "self_attn.value_embed.table.weight"
PROJECTIONS = {
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
"""The matrices of `Layer`, in the same way."""


class Shape(ctypes.Structure):
    """`struct Shape` of model.h, as are the structures up to `Weights`."""

    _fields_ = (
        *((name, c_int32) for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context")),
        *((name, c_int32) for name in ("pieces", "relu2", "dense", "head_bits", "cache_type", "threads")),
        ("eps", c_float),
        ("rope_theta", c_float),
    )


class Matrix(ctypes.Structure):
    """`struct Matrix`: packed codes and their scale, or float32, or bfloat16."""

    _fields_ = (("packed", c_void_p), ("floats", c_void_p), ("bfloats", c_void_p), ("scale", c_float))


class RowTable(ctypes.Structure):
    """`struct RowTable`: a dense matrix in memory, or in an open file."""

    _fields_ = (("memory", c_void_p), ("offset", c_int64), ("file", c_int32), ("is_bfloat16", c_int32))


class Layer(ctypes.Structure):
    """`struct Layer`: small tensors, NULL where there is none; rows that are added to values; projections."""

    _fields_ = (
        *((name, c_void_p) for name in VECTORS),
        ("value_table", RowTable),
        *((name, Matrix) for name in PROJECTIONS),
    )


class Weights(ctypes.Structure):
    """`struct Weights`: the tensors that belong to no layer."""

    _fields_ = (
        *((name, RowTable) for name in ("embedding", "head_rows")),
        ("head", Matrix),
        *((name, c_void_p) for name in ("norm", "head_codes", "head_panels", "head_int8_rows")),
    )


class Rounding(ctypes.Structure):
    """`struct Rounding` of packing.h: how latent weights are rounded, and statistics of them."""

    _fields_ = (
        *((name, c_float) for name in ("scale", "center")),
        ("binary", c_int32),
        *((name, c_double) for name in ("sum", "magnitude")),
        *((name, c_int64) for name in ("below", "above")),
    )


@cache
def library() -> Any:
    """The loaded library, its functions with their types.

    Raises:
        NoCompilerError: it cannot be compiled or loaded here.
    """
    loaded = build.library(ENGINE)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "bitnet_simd": (c_char_p, []),
        "bitnet_packed_bytes": (c_int64, [c_int, c_int]),
        "bitnet_pack_codes": (c_int, [c_void_p, c_int, c_int, c_void_p]),
        "bitnet_pack_folder": (c_int, [c_void_p, c_int, c_int, c_void_p, POINTER(c_int)]),
        "bitnet_pack_latent": (c_int, [c_void_p, c_void_p, c_int, c_int, POINTER(Rounding), c_void_p]),
        "bitnet_head_bytes": (c_int64, [c_int, c_int, c_int]),
        "bitnet_quantize_head": (c_int, [c_int, c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p]),
        "bitnet_multiply": (c_int, [c_void_p, c_int, c_int, c_void_p, c_int, c_void_p]),
        "bitnet_new": (c_void_p, [POINTER(Shape), POINTER(Layer), POINTER(Weights)]),
        "bitnet_free": (None, [c_void_p]),
        "bitnet_cache_new": (c_void_p, []),
        "bitnet_cache_free": (None, [c_void_p]),
        "bitnet_cache_fork": (c_void_p, [c_void_p, c_void_p]),
        "bitnet_cache_truncate": (None, [c_void_p, c_int]),
        "bitnet_cache_bytes": (c_int64, [c_void_p, c_int]),
        "bitnet_read_bandwidth": (c_double, [c_int64, c_int, c_int]),
        "bitnet_step": (c_int, [c_void_p, c_int, c_void_p, c_void_p, c_int, c_void_p, c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded
