"""From a `StoredModel` to weights in the layout of the kernels (packing.h), without torch and one matrix at a time.

A packed folder's codes are laid out anew; latent weights are rounded on the way, by the scale that is noted beside them
or, where none is, by the definition in `quant/weights.py`, which needs torch. Files are mapped, and their pages
given back at the end: what stays in memory is what a step reads, and the embedding stays in the file.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.errors import ModelError, UserError
from bitnet_lit.inference.engines.cpu import native
from bitnet_lit.quant.weights import AbsMean, AbsMedian, Sign

ROUNDED_HERE = (AbsMean(), AbsMedian(), Sign())  # by packing.h; codes of other rules come from the rule itself
ALIGN = 64
PIECE = 64 * 2**20
PADDED = 64  # inputs of the head are padded to a multiple, as `padded` in floats.h does


class Arena:
    """Memory for weights in large pieces, on huge pages where the system has them: a step walks through all of it, and
    would meet the end of a 4 KiB page at every turn."""

    def __init__(self) -> None:
        self._piece, self._used = mmap.mmap(-1, ALIGN), ALIGN

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Zeros that begin at a multiple of a cache line."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._used + size > len(self._piece):
            # Shared memory, which is mmap's default, gets no huge pages.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._piece, self._used = mmap.mmap(-1, max(size, PIECE), flags=flags), 0
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._piece.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(self._piece, dtype=dtype, count=math.prod(shape), offset=self._used)
        self._used += -(-size // ALIGN) * ALIGN
        return array.reshape(shape)


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """The array, or a copy of one that its file begins at an address where C++ has no such number."""
    return np.require(array, requirements=["C_CONTIGUOUS", "ALIGNED"])


def _addresses(array: NDArray[Any]) -> tuple[int | None, int | None]:
    """Where a dense matrix lies, as (float32, bfloat16) pointers, one of them None."""
    return (None, array.ctypes.data) if array.dtype == np.uint16 else (array.ctypes.data, None)


def pack(codes: NDArray[np.int8], arena: Arena) -> NDArray[np.uint8]:
    """int8 (O, I) codes in {-1, 0, +1} to the layout of the kernels."""
    codes = np.ascontiguousarray(codes, dtype=np.int8)
    packed = arena.take((native.library().bitnet_packed_bytes(*codes.shape),), np.uint8)
    native.library().bitnet_pack_codes(codes.ctypes.data, *codes.shape, packed.ctypes.data)
    return packed


HEAD_ROWS = np.dtype([("scale", np.float32, 16), ("zero", np.int32, 16)])  # `struct HeadRows` of head.h


def quantize_head(weight: NDArray[Any], bits: int, arena: Arena) -> tuple[NDArray[Any], ...]:
    """float32, or bfloat16 as its bits, (V, D) to the layout of head.h.

    Returns:
        Codes of `bits`, 4 or 8; (V / 16,) `HEAD_ROWS`; for 4 bits also int8 (V, D padded), else (0, 0).
    """
    vocab, inputs = weight.shape
    codes = arena.take((native.library().bitnet_head_bytes(bits, vocab, inputs),), np.uint8)
    rows = arena.take((-(-vocab // 16),), HEAD_ROWS)
    fine = arena.take((vocab, -(-inputs // PADDED) * PADDED) if bits == 4 else (0, 0), np.int8)
    status = native.library().bitnet_quantize_head(
        bits, *_addresses(weight), vocab, inputs, codes.ctypes.data, rows.ctypes.data, fine.ctypes.data
    )
    if status:
        raise ModelError("not enough memory for the output head")
    return codes, rows, fine


class Weights:
    """Reads the weights of `stored` and keeps them as long as it lives.

    Attributes:
        bytes_per_token: what a decode step reads of them.
    """

    def __init__(self, stored: StoredModel) -> None:
        self.stored = stored
        self.bytes_per_token = 0
        self._arena = Arena()
        self._kept: list[NDArray[Any]] = []  # what the engine points to
        self._checked: set[str] = set()

    def _keep(self, array: NDArray[Any]) -> NDArray[Any]:
        self._kept.append(array)
        return array

    def _dense(self, name: str) -> NDArray[Any]:
        """float32 or bfloat16 bits (O, I), mapped where the file can be."""
        mapped = self.stored.reader.mapped(name)
        return _aligned(self.stored.array(name) if mapped is None or mapped.dtype == np.uint8 else mapped)

    def _finite(self, name: str) -> NDArray[Any]:
        """`_dense`, checked for numbers that are none; of latent weights their sums tell."""
        values = self._dense(name)
        if name not in self._checked:
            self.stored.check_finite(name, values)
            self._checked.add(name)
        return values

    def vector(self, name: str) -> int | None:
        """The address of a float32 vector; None where the network has none of that name."""
        return self._keep(_aligned(self.stored.array(name))).ctypes.data if name in self.stored.tensors else None

    def table(self, name: str) -> native.Matrix:
        """A dense matrix of which a step reads some rows: left in the file."""
        floats, bfloats = _addresses(self._keep(self._finite(name)))
        return native.Matrix(None, floats, bfloats, 1.0)

    def projection(self, name: str) -> native.Matrix:
        """A matrix that a step reads from beginning to end: packed, or dense and copied to where reading is fastest."""
        if name in self.stored.quantized:
            packed, scale = self._packed(name)
            self.bytes_per_token += self._keep(packed).nbytes
            return native.Matrix(packed.ctypes.data, None, None, scale)
        values = self._finite(name)
        copy = self._keep(self._arena.take(values.shape, values.dtype))
        copy[...] = values
        self.bytes_per_token += copy.nbytes
        return native.Matrix(None, *_addresses(copy), 1.0)

    def integer_head(self, name: str, bits: int) -> tuple[int, ...]:
        """Addresses of the head's codes, of their scales and sums, and of finer rows, of which a step reads some."""
        codes, rows, fine = quantize_head(self._finite(name), bits, self._arena)
        self.bytes_per_token += codes.nbytes + rows.nbytes
        return tuple(self._keep(array).ctypes.data for array in (codes, rows, fine))

    def _packed(self, name: str) -> tuple[NDArray[np.uint8], float]:
        stored, (rows, inputs) = self.stored, self.stored.tensors[name]
        if not stored.holds_codes(name):
            return self._rounded(name)
        mapped = stored.reader.mapped(name)
        if mapped is None or mapped.dtype != np.uint8 or mapped.shape[0] == rows:  # a byte or more for each code
            codes, scale = stored.codes(name)
            return pack(codes.numpy(), self._arena), float(scale)
        packed = self._arena.take((native.library().bitnet_packed_bytes(rows, inputs),), np.uint8)
        if not native.library().bitnet_pack_folder(mapped.ctypes.data, rows, inputs, packed.ctypes.data):
            raise UserError(f"{stored.path}: tensor {name} holds no ternary codes: copy it again")
        return packed, float(stored.scale(name))

    def _rounded(self, name: str) -> tuple[NDArray[np.uint8], float]:
        """Latent weights as codes."""
        rule = self.stored.quant.scheme.weights
        if rule not in ROUNDED_HERE:
            codes, own_scale = self.stored.codes(name)
            return pack(codes.numpy(), self._arena), float(own_scale)
        (rows, inputs), latent = self.stored.tensors[name], self._dense(name)
        packed = self._arena.take((native.library().bitnet_packed_bytes(rows, inputs),), np.uint8)

        def round_by(scale: float, center: float) -> native.Rounding:
            rounding = native.Rounding(scale=scale, center=center, binary=rule == Sign())
            native.library().bitnet_pack_latent(*_addresses(latent), rows, inputs, rounding, packed.ctypes.data)
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
        """Whether noted statistics are of these weights and not of others that were put in their place."""
        scale, tolerance = rounding.scale, 1e-4 * rounding.scale  # float32 sums are right to a few millionths
        if not math.isfinite(rounding.magnitude):
            return False
        if abs(rounding.sum / count - rounding.center) > tolerance and rounding.binary:
            return False
        if self.stored.quant.scheme.weights == AbsMedian():
            return 2 * max(rounding.below, rounding.above) <= count
        return abs(rounding.magnitude / count - scale) <= tolerance or rounding.magnitude / count < scale <= 1e-5

    def done(self) -> None:
        """Everything was read: give the file's pages back."""
        self.stored.reader.release()
