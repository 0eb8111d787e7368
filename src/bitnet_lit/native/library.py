"""The compiled training functions from Python: their structures, and one `ctypes` function for each of training.cpp.

The functions run on the threads of the OpenMP library that PyTorch itself uses. They need its entry GOMP_parallel,
which GCC's and LLVM's library both have.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet_lit.native import build
from bitnet_lit.native.build import NoCompilerError

TRAINING = build.Source("training", Path(__file__).parent / "csrc" / "training.cpp")

AS_IS, TERNARY, SIGN = range(3)  # `enum Rounding` of projection.h


def _pointers(names: str) -> list[tuple[str, Any]]:
    return [(name, c_void_p) for name in names.split()]


def _integers(names: str) -> list[tuple[str, Any]]:
    return [(name, c_int32) for name in names.split()]


class Matrix(ctypes.Structure):
    """`struct Matrix` of projection.h, as are the next two."""

    _fields_ = (*_pointers("weight scale center"), *_integers("rows rounding scales"))


class Activations(ctypes.Structure):
    """`struct Activations`."""

    _fields_ = _pointers("codes scale floats")


class Norm(ctypes.Structure):
    """`struct Norm`."""

    _fields_ = (*_pointers("weight rstd"), ("eps", c_float))


class Linears(ctypes.Structure):
    """`struct Linears` of linears.h."""

    _fields_ = (
        *_integers("tokens inputs count quantized int8 threads"),
        ("limit", c_float),
        ("fork", c_void_p),
        ("matrices", Matrix * 3),
        ("norm", Norm),
        ("h", Activations),
        *_pointers("x y d_y"),
        ("d_y_row", c_int64),
        *_pointers("d_x d_norm d_weight residual d_residual"),
    )


class GatedMlp(ctypes.Structure):
    """`struct GatedMlp` of gated_mlp.h."""

    _fields_ = (
        *_integers("tokens hidden ffn relu2 quantized int8 threads"),
        ("limit", c_float),
        ("fork", c_void_p),
        ("gate_up", Matrix * 2),
        ("down", Matrix),
        ("norm", Norm),
        ("sub_norm", Norm),
        ("h", Activations),
        ("hf", Activations),
        *_pointers("gates x y d_y d_x d_norm d_sub_norm d_gate_up d_down residual d_residual"),
    )


class Attention(ctypes.Structure):
    """`struct Attention` of attention.h."""

    _fields_ = (
        *_integers("batch length heads kv_heads head_dim threads"),
        ("row", c_int64),
        ("d_row", c_int64),
        *_pointers("fork q k v cos sin y log_sum d_y d_q d_k d_v"),
    )


class DecoderLayer(ctypes.Structure):
    """`struct DecoderLayer` of decoder_layer.h."""

    _fields_ = (
        *_integers("batch length hidden ffn heads kv_heads head_dim relu2 quantized int8 threads"),
        ("limit", c_float),
        ("fork", c_void_p),
        ("matrices", Matrix * 7),
        ("norms", Norm * 4),
        *_pointers("cos sin x y kept"),
        ("kept_floats", c_int64),
        *_pointers("d_y d_x d_parameters"),
    )


class Loss(ctypes.Structure):
    """`struct Loss` of loss.h."""

    _fields_ = (
        *_integers("tokens hidden vocabulary threads"),
        ("eps", c_float),
        *_pointers("fork x gain head targets losses d_x d_gain d_head"),
    )


class Iterations(ctypes.Structure):
    """`struct Iterations` of newton_schulz.h, as are the next two."""

    _fields_ = (*((name, c_float) for name in ("a", "b", "c", "eps")), ("steps", c_int32))


class NewtonSchulz(ctypes.Structure):
    """`struct NewtonSchulz`."""

    _fields_ = (
        *_pointers("inputs outputs"),
        *_integers("count rows columns threads"),
        ("iterations", Iterations),
        ("fork", c_void_p),
    )


class MuonStep(ctypes.Structure):
    """`struct MuonStep`."""

    _fields_ = (
        *((name, POINTER(c_void_p)) for name in ("weights", "gradients", "averages", "row_moments")),
        *_integers("count rows columns threads nesterov cautious"),
        *((name, c_float) for name in ("momentum", "new_share", "kept", "rate", "row_new_share")),
        ("iterations", Iterations),
        ("fork", c_void_p),
    )


FUNCTIONS = {
    "linears_forward": Linears,
    "linears_backward": Linears,
    "gated_mlp_forward": GatedMlp,
    "gated_mlp_backward": GatedMlp,
    "attention_forward": Attention,
    "attention_backward": Attention,
    "decoder_layer_forward": DecoderLayer,
    "decoder_layer_backward": DecoderLayer,
    "loss": Loss,
    "newton_schulz": NewtonSchulz,
    "muon_step": MuonStep,
}


@cache
def fork() -> int:
    """Return the address of GOMP_parallel in the OpenMP library of PyTorch.

    Raises:
        NoCompilerError: it has none, as where PyTorch was built without OpenMP.
    """
    try:
        address = ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, c_void_p).value
    except (AttributeError, OSError):
        address = None
    if address is None:
        raise NoCompilerError("PyTorch has no OpenMP threads here")
    return address


def _let_openmp_rest(loaded: ctypes.CDLL) -> None:
    """Shorten the busy waiting of PyTorch's threads (csrc/openmp.h), unless a variable says how long they wait."""
    if sys.platform == "linux" and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        loaded.bitnet_let_openmp_rest(c_void_p(fork()))


@cache
def functions() -> dict[str, Callable[[ctypes.Structure], None]]:
    """Return the compiled functions by their names. The first call in a process loads them, or compiles them.

    Raises:
        NoCompilerError: they cannot be compiled or loaded here.
    """
    fork()
    loaded = build.library(TRAINING)
    _let_openmp_rest(loaded)
    return functions_of(loaded)


def functions_of(loaded: ctypes.CDLL) -> dict[str, Callable[[ctypes.Structure], None]]:
    """Return the functions of a compiled library by their names."""
    found: dict[str, Callable[[ctypes.Structure], None]] = {}
    for name, structure in FUNCTIONS.items():
        function = getattr(loaded, f"bitnet_{name}")
        function.restype, function.argtypes = None, [POINTER(structure)]
        found[name] = function
    return found


def has_amx() -> bool:
    """Return whether the compiled functions multiply on Intel's matrix unit (csrc/amx.h).

    Not every compiler knows the unit, and not every system lets a process use it.

    Raises:
        NoCompilerError: the functions cannot be compiled or loaded here.
    """
    functions()
    return bool(build.library(TRAINING).bitnet_has_amx())


_is_on = True


def is_available() -> bool:
    """Return whether this process can call the functions. The first call may compile them."""
    if _is_on:
        with contextlib.suppress(NoCompilerError):
            functions()
            return True
    return False


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Let PyTorch compute what has no key of its own to say so (`quant.kernel` is for layers)."""
    global _is_on
    before, _is_on = _is_on, False
    try:
        yield
    finally:
        _is_on = before


def address(tensor: Tensor | None) -> int | None:
    """Return where the elements of `tensor` begin, or None."""
    return None if tensor is None else tensor.data_ptr()


class Call:
    """A structure whose pointers belong to tensors, for an autograd function.

    The backward pass gets tensors from autograd, which may have moved them in between (activation checkpointing, FSDP).
    So each pointer that it needs is set again there.
    """

    def __init__(self, arguments: ctypes.Structure) -> None:
        self.arguments = arguments
        self.tensors: list[Tensor | None] = []
        self._pointers: list[tuple[ctypes.Structure, str]] = []

    def point(self, structure: ctypes.Structure, **tensors: Tensor | None) -> None:
        """Set fields of `arguments`, or of a structure in it, that the backward pass reads too."""
        for name, tensor in tensors.items():
            setattr(structure, name, address(tensor))
            self._pointers.append((structure, name))
            self.tensors.append(tensor)

    def save(self, ctx: Any) -> None:
        """Hand the tensors to autograd, at the end of the forward pass."""
        ctx.save_for_backward(*self.tensors)
        self.tensors = []
        ctx.call = self

    def run(self, function: str) -> None:
        """Call a function of `FUNCTIONS`."""
        functions()[function](self.arguments)

    def run_backward(self, function: str, ctx: Any) -> None:
        """Call a function of `FUNCTIONS` with the tensors that autograd kept."""
        tensors = ctx.saved_tensors  # autograd may have no other reference to them
        for (structure, name), tensor in zip(self._pointers, tensors, strict=True):
            setattr(structure, name, address(tensor))
        self.run(function)
