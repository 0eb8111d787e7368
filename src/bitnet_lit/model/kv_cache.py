"""The key/value cache: what attention has already seen, so that a new token costs one step.

Keys are stored after rotation, so their positions are baked in and the cache is just "the past".
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_lit.config import ModelConfig

FIRST_POSITIONS = 256


class KVCache:
    """Keys and values of every layer, filled from position 0; room grows by doubling, up to the context.

    Attributes:
        keys, values: (layers, batch, kv_heads, room, head_dim).
        length: positions filled so far.
        max_length: positions there can be.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        room = min(FIRST_POSITIONS, max_length)  # a context can be long, and a text short
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
        """Store T new positions of one layer; (B, kv_heads, T, head_dim) in, (B, kv_heads, length + T, head_dim) out.

        `length` moves on only with `advance`, after the last layer.
        """
        end = self.length + key.shape[2]
        assert end <= self.max_length, f"{end} positions in a cache of {self.max_length}"
        if end > self.keys.shape[3]:
            self._grow(end)
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, num_positions: int) -> None:
        """Count T positions as filled, once every layer has appended them."""
        self.length += num_positions

    def fork(self) -> KVCache:
        """A cache of its own with the same past: several texts from one prompt."""
        other = copy.copy(self)
        other.keys, other.values = self.keys.clone(), self.values.clone()
        return other

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        assert 0 <= length <= self.length
        self.length = length
