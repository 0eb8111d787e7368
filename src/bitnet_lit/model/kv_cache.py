"""The key/value cache keeps the keys and values of earlier positions, so that each new token needs one forward step.

Keys are stored after the rotary embedding, so they hold their positions already.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_lit.config import ModelConfig

FIRST_POSITIONS = 256


class KVCache:
    """A KVCache holds the keys and values of every layer, from position 0 on.

    Its memory grows by doubling, up to `max_length` positions.

    Attributes:
        keys, values: (layers, batch, kv_heads, allocated positions, head_dim).
        length: positions that are filled.
        max_length: the most positions that it can hold.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        room = min(FIRST_POSITIONS, max_length)  # most texts are much shorter than a long context
        shape = (config.num_hidden_layers, batch_size, config.num_kv_heads, room, config.head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.max_length = max_length
        self.length = 0

    def _grow(self, needed: int) -> None:
        room = self.keys.shape[3]
        more = min(max(needed, 2 * room), self.max_length) - room
        self.keys = F.pad(self.keys, (0, 0, 0, more))
        self.values = F.pad(self.values, (0, 0, 0, more))

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions of one layer, and return all its keys and values.

        `length` does not change here: call `advance` after the last layer.

        Args:
            layer: the index of the layer.
            key, value: (B, kv_heads, T, head_dim).

        Returns:
            Keys and values, each (B, kv_heads, length + T, head_dim), as views of the cache.
        """
        end = self.length + key.shape[2]
        assert end <= self.max_length, f"{end} positions in a cache of {self.max_length}"
        if end > self.keys.shape[3]:
            self._grow(end)
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, num_positions: int) -> None:
        """Count `num_positions` more positions as filled. Call this once every layer has appended them."""
        self.length += num_positions

    def fork(self) -> KVCache:
        """Return an independent copy of the cache, so that several texts can go on from one prompt."""
        other = copy.copy(self)
        other.keys, other.values = self.keys.clone(), self.values.clone()
        return other

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        assert 0 <= length <= self.length
        self.length = length
