"""A safetensors file is written one tensor at a time, so that the model does not have to fit into memory.

The format (github.com/huggingface/safetensors) is 8 bytes with the length of the header, the header as JSON (dtype,
shape and offsets of each tensor), and the tensors' bytes. The offsets follow from shapes and dtypes, so the header is
written before any tensor is read. The result is byte for byte that of `safetensors.torch.save_file`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8"}


@dataclass(frozen=True)
class LazyTensor:
    """Describes a tensor to write; `read` loads its values when they are written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Iterable[LazyTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to `path`, one in memory at a time; `metadata` goes into the header."""
    # Wide dtypes first, so that every tensor starts at a multiple of its item size.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, DTYPES[tensor.dtype], tensor.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered:
            value = tensor.read().detach().to(tensor.dtype).cpu().contiguous()
            assert tuple(value.shape) == tensor.shape, f"{tensor.name}: {tuple(value.shape)}, announced {tensor.shape}"
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)  # tofile would hide why it failed
