"""`TensorReader` is the interface to the tensors of a file: their names, shapes and values, in any format.

A format that is read implements `shapes` and `read`, and `StoredModel` does the rest. A file that holds tensors as they
are in memory also implements `place` and `raw`. The native engine reads such tensors without converting them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Place:
    """Says where a tensor lies in an open file.

    Attributes:
        descriptor: the file's descriptor; it is open as long as the reader exists.
        offset: the position of the first element, in bytes.
        dtype: numpy's type of the elements: "<f4", "<u2" (the bits of bfloat16) or "u1".
    """

    descriptor: int
    offset: int
    dtype: str


class TensorReader(ABC):
    """Reads the tensors of a file under the names of our state dict.

    Attributes:
        metadata: texts that the file holds beside its tensors.
    """

    metadata: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""

    @abstractmethod
    def read(self, name: str) -> NDArray[Any]:
        """Return a copy of one tensor: float types are converted to float32, integers keep their type."""

    def place(self, name: str) -> Place | None:
        """Return where one tensor lies in the file; None unless it is stored as float32, bfloat16 or uint8."""
        return None

    def raw(self, name: str) -> NDArray[Any] | None:
        """Return a copy of one tensor as it is stored: float32, bfloat16 as its bits (uint16), or uint8.

        The result is None where `place` returns None.
        """
        return None
