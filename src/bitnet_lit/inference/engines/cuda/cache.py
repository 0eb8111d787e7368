"""A `CudaCache` has the keys and values of one text on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_lit.config import ModelConfig
from bitnet_lit.errors import ModelError

FIRST_POSITIONS = 256


class CudaCache:
    """Is the cache of one text. Its memory grows by doubling, up to the context.

    Attributes:
        length: tokens in it.
        memory: (layers, 2, KV, room, P): keys and values of each layer. Keys are stored after the rotary embedding.
        room, address: how many positions there is memory for, and where. They are read for each text of each step, and
            asking the tensor takes microseconds.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._config, self._device, self._dtype = config, device, dtype
        self.length = 0
        self._keep(self._new_memory(min(FIRST_POSITIONS, config.max_position_embeddings)))

    def _new_memory(self, room: int) -> Tensor:
        config = self._config
        shape = (config.num_hidden_layers, 2, config.num_kv_heads, room, config.head_size)
        try:
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        except torch.cuda.OutOfMemoryError:
            raise ModelError(
                f"not enough memory on {self._device} for the keys and values of a text of {room} tokens: take "
                "shorter or fewer texts"
            ) from None

    def _keep(self, memory: Tensor) -> None:
        self.memory, self.room, self.address = memory, memory.shape[3], memory.data_ptr()

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens, which the context holds.

        Raises:
            ModelError: not enough memory.
        """
        if length > self.room:
            old, kept = self.memory, self.length
            self._keep(self._new_memory(min(max(2 * self.room, length), self._config.max_position_embeddings)))
            self.memory[:, :, :, :kept] = old[:, :, :, :kept]

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        self.length = min(self.length, length)

    def fork(self) -> CudaCache:
        """Return a copy, for another text that begins in the same way."""
        copy = CudaCache.__new__(CudaCache)
        copy._config, copy._device, copy._dtype = self._config, self._device, self._dtype
        copy.length = self.length
        copy._keep(self.memory.clone())
        return copy
