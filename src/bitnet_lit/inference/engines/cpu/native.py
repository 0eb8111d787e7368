"""The compiled engine from Python: its structures, and one `ctypes` function for each of its calls."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

from bitnet_lit.inference.engines.cpu import build


class Shape(ctypes.Structure):
    """`struct Shape` of model.h, as the three below it."""

    _fields_ = (
        *((name, c_int32) for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context")),
        *((name, c_int32) for name in ("relu2", "dense", "head_bits", "cache_type", "threads")),
        ("eps", c_float),
        ("rope_theta", c_float),
    )


class Matrix(ctypes.Structure):
    """`struct Matrix`: packed codes and their scale, or float32, or bfloat16."""

    _fields_ = (("packed", c_void_p), ("floats", c_void_p), ("bfloats", c_void_p), ("scale", c_float))


NORMS = ("input_norm", "attn_norm", "post_norm", "ffn_norm")
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class Layer(ctypes.Structure):
    """`struct Layer`: norms (NULL where there is none) and projections."""

    _fields_ = (*((name, c_void_p) for name in NORMS), *((name, Matrix) for name in PROJECTIONS))


class Weights(ctypes.Structure):
    """`struct Weights`: what is no layer."""

    _fields_ = (
        *((name, Matrix) for name in ("embedding", "head")),
        *((name, c_void_p) for name in ("norm", "head_codes", "head_rows", "head_fine")),
    )


class Rounding(ctypes.Structure):
    """`struct Rounding` of packing.h: what latent weights are rounded by, and sums over them."""

    _fields_ = (
        *((name, c_float) for name in ("scale", "center")),
        ("binary", c_int32),
        *((name, c_double) for name in ("sum", "magnitude")),
        *((name, c_int64) for name in ("below", "above")),
    )


@cache
def library() -> Any:
    """The loaded library, its functions typed.

    Raises:
        NoCompilerError: it cannot be compiled or loaded here.
    """
    loaded = build.library()
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "bitnet_simd": (c_char_p, []),
        "bitnet_packed_bytes": (c_int64, [c_int, c_int]),
        "bitnet_pack_codes": (None, [c_void_p, c_int, c_int, c_void_p]),
        "bitnet_pack_folder": (c_int, [c_void_p, c_int, c_int, c_void_p]),
        "bitnet_pack_latent": (None, [c_void_p, c_void_p, c_int, c_int, POINTER(Rounding), c_void_p]),
        "bitnet_head_bytes": (c_int64, [c_int, c_int, c_int]),
        "bitnet_quantize_head": (c_int, [c_int, c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p]),
        "bitnet_multiply": (None, [c_void_p, c_int, c_int, c_void_p, c_int, c_void_p]),
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
