"""Weights of a `StoredModel` are brought into the kernels' layout (csrc/packing.h), without torch, one at a time.

Packed bytes of a model folder go to the kernels' layout in one pass. Latent weights are rounded on the way, by the
scale that is noted beside them or, where none is, by the definition in `quant/weights.py`, which needs torch. A
large embedding stays in its file, from which a step reads one row for each token; everything else is in memory.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.checkpoints.tensor_reader import Place
from bitnet_lit.errors import ModelError, UserError
from bitnet_lit.inference.engines.cpu import native
from bitnet_lit.quant.weights import AbsMean, AbsMedian, Sign

ROUNDED_HERE = (AbsMean(), AbsMedian(), Sign())
"""Rules that csrc/packing.h rounds by. Codes of other rules come from the rule itself."""
CACHE_LINE = 64  # bytes; the kernels' vectors begin at one
ARENA_PIECE = 64 * 2**20  # bytes that are mapped at once: many huge pages
TABLE_IN_MEMORY = 128 * 2**20
"""Bytes of an embedding or an output head that are kept in memory beside what a step reads from beginning to end. A
larger one stays in its file. Reading a row from a file takes about half a microsecond longer than from memory: a step
of a small model with an int4 head, which reads some hundred rows of it, would take 5 % longer; a large one does not."""
PADDED = 64  # inputs of the head are padded to a multiple of it: `padded` of csrc/buffer.h
HEAD_PANEL = np.dtype([("scale", np.float32, 16), ("zero_term", np.int32, 16)])
"""`struct HeadPanel` of csrc/lm_head_quantize.h."""


class Arena:
    """Gives memory for weights in large pieces, on huge pages where the system has them.

    A step walks through all weights; on 4 KiB pages the processor would look up a new page every 4 KiB.
    """

    def __init__(self) -> None:
        self._piece, self._used = mmap.mmap(-1, CACHE_LINE), CACHE_LINE

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return an array of zeros that begins at a cache line."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._used + size > len(self._piece):
            # Shared memory, which is mmap's default, gets no huge pages.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._piece, self._used = mmap.mmap(-1, max(size, ARENA_PIECE), flags=flags), 0
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._piece.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(self._piece, dtype=dtype, count=math.prod(shape), offset=self._used)
        self._used += -(-size // CACHE_LINE) * CACHE_LINE
        return array.reshape(shape)


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array, or a copy if it lies at an address where C++ cannot read such a number."""
    return np.require(array, requirements=["C_CONTIGUOUS", "ALIGNED"])


def _addresses(array: NDArray[Any]) -> tuple[int | None, int | None]:
    """Return the address of a dense matrix as (float32, bfloat16) pointers, one of them None."""
    return (None, array.ctypes.data) if array.dtype == np.uint16 else (array.ctypes.data, None)


def _check(status: int) -> None:
    if status:
        raise ModelError("not enough memory for the weights")


def pack(codes: NDArray[np.int8], arena: Arena) -> NDArray[np.uint8]:
    """Pack int8 (O, I) codes of -1, 0 and +1.

    Returns:
        uint8 (bytes,), in the layout of the kernels.

    Raises:
        ModelError: not enough memory.
    """
    codes = np.ascontiguousarray(codes, dtype=np.int8)
    packed = arena.take((native.library().bitnet_packed_bytes(*codes.shape),), np.uint8)
    _check(native.library().bitnet_pack_codes(codes.ctypes.data, *codes.shape, packed.ctypes.data))
    return packed


def quantize_head(weight: NDArray[Any], bits: int, arena: Arena) -> tuple[NDArray[Any], ...]:
    """Round the rows of an output head (csrc/lm_head_quantize.h).

    Args:
        weight: (V, D) float32, or bfloat16 as its bits (uint16).
        bits: of a code, 4 or 8.

    Returns:
        codes: uint8 (bytes,).
        panels: (V / 16,) `HEAD_PANEL`.
        int8_rows: int8 (V, D padded) for 4 bits, else (0, 0).

    Raises:
        ModelError: not enough memory.
    """
    vocab, inputs = weight.shape
    codes = arena.take((native.library().bitnet_head_bytes(bits, vocab, inputs),), np.uint8)
    panels = arena.take((-(-vocab // 16),), HEAD_PANEL)
    int8_rows = arena.take((vocab, -(-inputs // PADDED) * PADDED) if bits == 4 else (0, 0), np.int8)
    _check(
        native.library().bitnet_quantize_head(
            bits, *_addresses(weight), vocab, inputs, codes.ctypes.data, panels.ctypes.data, int8_rows.ctypes.data
        )
    )
    return codes, panels, int8_rows


class Weights:
    """Holds the weights of `stored` for the engine, which points into them: they live as long as this object.

    Attributes:
        bytes_per_token: what a decode step reads of them.
    """

    def __init__(self, stored: StoredModel) -> None:
        self.stored = stored
        self.bytes_per_token = 0
        self._arena = Arena()
        self._kept: list[NDArray[Any]] = []  # what the engine points to
        self._checked: set[str] = set()
        self._in_memory: dict[str, NDArray[Any]] = {}  # dense matrices

    def _keep(self, array: NDArray[Any]) -> NDArray[Any]:
        self._kept.append(array)
        return array

    def _dense(self, name: str) -> NDArray[Any]:
        """Return a dense matrix (O, I): float32, or bfloat16 as its bits where it is stored so."""
        raw = self.stored.reader.raw(name)
        return _aligned(self.stored.array(name) if raw is None or raw.dtype == np.uint8 else raw)

    def _finite(self, name: str) -> NDArray[Any]:
        """Return `_dense` after a check for NaN and infinity. (Latent weights are checked by their sums.)"""
        values = self._dense(name)
        if name not in self._checked:
            self.stored.check_finite(name, values)
            self._checked.add(name)
        return values

    def vector(self, name: str) -> int | None:
        """Return the address of a float32 vector; None where the network has none of that name."""
        return self._keep(_aligned(self.stored.array(name))).ctypes.data if name in self.stored.tensors else None

    def _place(self, name: str) -> Place | None:
        """Return where a table stays in its file; None where it is kept in memory."""
        place = self.stored.reader.place(name)
        if place is None or place.dtype == "u1":  # the engine reads float32 and bfloat16
            return None
        size = math.prod(self.stored.tensors[name]) * np.dtype(place.dtype).itemsize
        return place if size > TABLE_IN_MEMORY else None

    def _table(self, name: str) -> NDArray[Any]:
        """Return the values of a table, which are kept if they stay in memory."""
        if name in self._in_memory:
            return self._in_memory[name]
        values = self._finite(name)
        if self._place(name) is None:
            self._in_memory[name] = self._keep(values)
        return values

    def row_table(self, name: str) -> native.RowTable:
        """Return a dense matrix of which a step reads some rows, in memory or in its file."""
        place = self._place(name)
        if place is None:
            values = self._table(name)
            return native.RowTable(memory=values.ctypes.data, is_bfloat16=values.dtype == np.uint16)
        if name not in self._checked:
            self._finite(name)
        return native.RowTable(offset=place.offset, file=place.descriptor, is_bfloat16=place.dtype == "<u2")

    def projection(self, name: str) -> native.Matrix:
        """Return a matrix that a step reads whole: packed, or dense and copied to where reading is fastest."""
        if name in self.stored.quantized:
            packed, scale = self._packed(name)
            self.bytes_per_token += self._keep(packed).nbytes
            return native.Matrix(packed=packed.ctypes.data, scale=scale)
        dense = self._finite(name)
        copy = self._in_memory[name] = self._keep(self._arena.take(dense.shape, dense.dtype))
        copy[...] = dense
        self.bytes_per_token += copy.nbytes
        floats, bfloats = _addresses(copy)
        return native.Matrix(floats=floats, bfloats=bfloats, scale=1.0)

    def integer_head(self, name: str, bits: int) -> tuple[int, int, int]:
        """Return the addresses of `quantize_head`'s results."""
        codes, panels, int8_rows = map(self._keep, quantize_head(self._table(name), bits, self._arena))
        self.bytes_per_token += codes.nbytes + panels.nbytes  # a step reads few of the int8 rows
        return codes.ctypes.data, panels.ctypes.data, int8_rows.ctypes.data

    def _packed(self, name: str) -> tuple[NDArray[np.uint8], float]:
        stored, (rows, inputs) = self.stored, self.stored.tensors[name]
        if not stored.holds_codes(name):
            return self._rounded(name)
        raw = stored.reader.raw(name)
        if raw is None or raw.dtype != np.uint8 or raw.shape[0] == rows:  # a byte or more for each code
            codes, scale = stored.codes(name)
            return pack(codes.numpy(), self._arena), float(scale)
        packed = self._arena.take((native.library().bitnet_packed_bytes(rows, inputs),), np.uint8)
        are_codes = ctypes.c_int()
        _check(native.library().bitnet_pack_folder(raw.ctypes.data, rows, inputs, packed.ctypes.data, are_codes))
        if not are_codes:
            raise UserError(f"{stored.path}: tensor {name} holds no ternary codes: copy it again")
        return packed, float(stored.scale(name))

    def _rounded(self, name: str) -> tuple[NDArray[np.uint8], float]:
        """Return latent weights as packed codes, and their scale."""
        rule = self.stored.quant.scheme.weights
        if rule not in ROUNDED_HERE:
            codes, own_scale = self.stored.codes(name)
            return pack(codes.numpy(), self._arena), float(own_scale)
        (rows, inputs), latent = self.stored.tensors[name], self._dense(name)
        packed = self._arena.take((native.library().bitnet_packed_bytes(rows, inputs),), np.uint8)

        def round_by(scale: float, center: float) -> native.Rounding:
            rounding = native.Rounding(scale=scale, center=center, binary=rule == Sign())
            _check(native.library().bitnet_pack_latent(*_addresses(latent), rows, inputs, rounding, packed.ctypes.data))
            return rounding

        noted = self.stored.noted_statistics(name)
        if noted and self._plausible(round_by(*noted), rows * inputs):
            return packed, noted[0]
        statistics = rule.statistics(self.stored.tensor(name))
        assert statistics is not None, "rules of one scale and one center"
        scale, center = map(float, statistics)
        round_by(scale, center)
        return packed, scale

    def _plausible(self, rounding: native.Rounding, count: int) -> bool:
        """Return whether the noted scale and center are those of these weights, not of others put in their place."""
        scale, tolerance = rounding.scale, 1e-4 * rounding.scale  # float32 sums are right to a few millionths
        if not math.isfinite(rounding.magnitude):
            return False
        if abs(rounding.sum / count - rounding.center) > tolerance and rounding.binary:
            return False
        if self.stored.quant.scheme.weights == AbsMedian():
            return 2 * max(rounding.below, rounding.above) <= count
        return abs(rounding.magnitude / count - scale) <= tolerance or rounding.magnitude / count < scale <= 1e-5
