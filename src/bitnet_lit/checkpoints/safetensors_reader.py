"""Tensors of safetensors files are read here as numpy arrays, without torch.

The format (github.com/huggingface/safetensors) is 8 bytes with the length of the header, the header as JSON (dtype,
shape and offsets of each tensor), and the tensors' bytes. The safetensors library checks the file. The tensors are then
read here at the offsets in the header, because the library's numpy functions do not support bfloat16.

Tensors are read, never memory-mapped. When another program shortens a mapped file, the next access ends the process
(SIGBUS); a read returns fewer bytes, which becomes an error message.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bitnet_lit.checkpoints.file_names import INDEX_NAME, WEIGHTS_NAME
from bitnet_lit.checkpoints.tensor_reader import Place, TensorReader
from bitnet_lit.errors import UserError
from bitnet_lit.files.foreign_json import parse_json, read_json
from bitnet_lit.files.json_shapes import MapOf, Record, Text
from bitnet_lit.files.regular_file import open_regular

# numpy's type for each dtype in a file. numpy has no bfloat16, so its 16 bits are read as an integer.
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
HEADER = Record(optional={"__metadata__": MapOf(Text())})  # the library has checked the tensors' entries
INDEX = Record({"weight_map": MapOf(Text())})


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Convert the bits of bfloat16 numbers to float32, which is exact; the shape is kept."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class SafetensorsReader(TensorReader):
    """Reads one safetensors file, or the several files that an index names.

    The files stay open: a training run may replace the folder at any moment, and all tensors must come from the same
    folder.

    Raises:
        UserError: a file is missing or damaged, or a dtype is not known.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._place: dict[str, tuple[Path, str, int]] = {}  # file, dtype, offset
        self._shapes: dict[str, tuple[int, ...]] = {}
        metadata: dict[str, str] = {}
        for path in files:
            self._files[path] = open_regular(path, "is this a model folder?")
            header, start = _checked_header(path, self._files[path])
            metadata |= header.pop("__metadata__", {})
            for name, entry in header.items():
                if entry["dtype"] not in DTYPES:
                    raise UserError(f"{path}: tensor {name} is {entry['dtype']}: known are {', '.join(DTYPES)}")
                self._place[name] = path, entry["dtype"], start + entry["data_offsets"][0]
                self._shapes[name] = tuple(entry["shape"])
        self.metadata = metadata

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> NDArray[Any]:
        values, dtype = self._stored(name), self._place[name][1]
        if dtype == "BF16":
            return bfloat16_to_float32(values)
        return values.astype(np.float32, copy=False) if dtype.startswith("F") else values

    def place(self, name: str) -> Place | None:
        path, dtype, offset = self._place[name]
        return Place(self._files[path].fileno(), offset, DTYPES[dtype]) if dtype in ("F32", "BF16", "U8") else None

    def raw(self, name: str) -> NDArray[Any] | None:
        return None if self.place(name) is None else self._stored(name)

    def _stored(self, name: str) -> NDArray[Any]:
        path, dtype, offset = self._place[name]
        values = np.empty(self._shapes[name], dtype=DTYPES[dtype])
        read_into(values, self._files[path].fileno(), offset, path)
        return values


def read_into(values: NDArray[Any], descriptor: int, offset: int, path: Path) -> None:
    """Fill an array with the bytes of an open file from `offset` on.

    Args:
        path: the file's path, for error messages.

    Raises:
        UserError: the file is too short, or the disk fails.
    """
    buffer = values.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(buffer):  # a call reads 2 GiB at most
        try:
            got = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise UserError(f"{path}: cannot be read any more ({error.strerror}): copy it again") from None
        if not got:
            raise UserError(f"{path}: is shorter than when it was opened: copy it again")
        done += got


def _checked_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Let the library check a file; return its header and the offset of its tensors in bytes."""
    try:
        with safe_open(path, framework="numpy"):
            pass
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise UserError(f"{path}: was replaced while it was opened: give the same command again")
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): is this a model folder?") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error}): copy or export it again") from None
    return parse_json(text, f"{path}: header", HEADER, "copy or export it again"), 8 + length


def safetensors_files(folder: Path) -> list[Path]:
    """List the weight files of a folder: model.safetensors, or the files that model.safetensors.index.json names.

    Raises:
        UserError: the index cannot be read.
    """
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if single.is_file() or not index.is_file():
        return [single]
    names = sorted(set(read_json(index, INDEX, "copy it again")["weight_map"].values()))
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{index}: names no file of this folder: copy it again")
    return [folder / name for name in names]
