"""The units of `FastEncoder` in C++: a table of the ids of each unit, and a loop over the units of a text.

The first process that encodes much text compiles csrc/units.cpp, in about a second. Without a compiler, the encoder
goes on in Python.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

from bitnet_lit.native import build

UNITS = build.Source("units", Path(__file__).parent / "csrc" / "units.cpp")
_PADDING = b"\0" * 8  # the loop reads eight bytes at once


class _State(ctypes.Structure):
    """`struct State` of units.cpp."""

    _fields_ = (
        ("text", c_char_p),
        ("out", c_void_p),
        *((name, c_int64) for name in ("size", "position", "written", "start", "end")),
        *((name, c_int32) for name in ("cuts_lines", "drops_spaces", "is_glued", "bos_bytes")),
        ("bos", c_uint64),
    )


class NativeUnits:
    """Holds a table of units.

    Args:
        encode_unit: returns the bytes of the ids of a unit, and whether to keep them in the table. Its arguments are
            the unit, and whether it is glued to the text before it.
        itemsize: bytes of an id.
        drops_spaces: whether a run of spaces counts as one.
        limit: the table is emptied when it holds as many units.

    Raises:
        NoCompilerError: it cannot be compiled here.
    """

    def __init__(
        self, encode_unit: Callable[[str, bool], tuple[bytes, bool]], itemsize: int, drops_spaces: bool, limit: int
    ) -> None:
        if sys.byteorder != "little":
            raise build.NoCompilerError("units.cpp is written for little-endian machines")
        self._encode_unit, self._itemsize, self._limit = encode_unit, itemsize, limit
        library = build.library(UNITS)
        library.units_new.restype = c_void_p
        library.units_count.restype = c_int64
        library.units_count.argtypes = library.units_free.argtypes = library.units_clear.argtypes = (c_void_p,)
        library.units_add.argtypes = (c_void_p, c_char_p, c_int64, c_int32, c_char_p, c_int64)
        library.units_encode.argtypes = (c_void_p, POINTER(_State))
        self._library, self._table = library, library.units_new()
        self._encode_units, self._count = library.units_encode, library.units_count
        self._buffer = ctypes.create_string_buffer(1)
        # One for all texts: most are short, and making one would take longer than looking up their words.
        self._state = _State(drops_spaces=drops_spaces)
        self._reference = ctypes.byref(self._state)
        weakref.finalize(self, library.units_free, self._table)

    def add(self, unit: bytes, is_glued: bool, ids: bytes) -> None:
        """Keep the bytes of the ids of a unit, which is in UTF-8."""
        if self._count(self._table) >= self._limit:
            self._library.units_clear(self._table)
        self._library.units_add(self._table, unit + _PADDING, len(unit), is_glued, ids, len(ids))

    def encode(self, content: bytes, cuts_lines: bool, bos: bytes = b"") -> bytes:
        """Return the bytes of the ids of a text, which neither begins nor ends with a space.

        Args:
            content: the text in UTF-8; or several texts, with a NUL between them.
            cuts_lines: whether each line break begins a unit.
            bos: the bytes of the id that is written in place of a NUL.
        """
        content += _PADDING
        size = len(content) - len(_PADDING)
        # A byte gives one id at most, and a unit one more for the space in front of it.
        room = (2 * size + 2) * self._itemsize + len(_PADDING)
        state = self._state
        if len(self._buffer) < room:
            self._buffer = ctypes.create_string_buffer(room)
            state.out = ctypes.addressof(self._buffer)
        state.text, state.size, state.position, state.written = content, size, 0, 0
        state.cuts_lines, state.bos_bytes, state.bos = cuts_lines, len(bos), int.from_bytes(bos, "little")
        while self._encode_units(self._table, self._reference):
            unit, is_glued = content[state.start : state.end], bool(state.is_glued)
            ids, is_kept = self._encode_unit(unit.decode(), is_glued)
            ctypes.memmove(state.out + state.written, ids, len(ids))
            state.written += len(ids)
            if is_kept:
                self.add(unit, is_glued, ids)
        return ctypes.string_at(self._buffer, state.written)
