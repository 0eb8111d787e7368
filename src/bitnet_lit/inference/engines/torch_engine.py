"""The PyTorch engine runs everywhere, and is the reference for the others."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet_lit.inference.engines import check_step
from bitnet_lit.model import CausalLM, KVCache
from bitnet_lit.quant import pack_linears


class TorchEngine:
    """Runs a `CausalLM` as an `inference.engines.Engine`. The texts of a step run one after the other.

    Args:
        model: the network; it is not changed.
        pack: convert a copy of the quantized layers to integer codes, so that weights are not rounded again at every
            token. That gives the same integers, several times faster. False uses the model's own layers, which is right
            for a model that is being trained.
    """

    texts_at_once = 8

    def __init__(self, model: CausalLM, pack: bool = True) -> None:
        self.name = "PyTorch"
        self.device, self.dtype = model.model.embed_tokens.weight.device, model.model.embed_tokens.weight.dtype
        if pack:
            model = copy.deepcopy(model)
            pack_linears(model)
            model.eval()
        self.model = model
        self.max_length = model.config.max_position_embeddings
        # A copy stays in evaluation mode, and any number of threads run it at once. A model in training is put into
        # evaluation mode for each step and back, which one thread at a time may do.
        self._shared = not pack
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return self.name

    def new_cache(self) -> KVCache:
        """Return an empty cache."""
        return KVCache(self.model.config, 1, self.max_length, self.device, self.dtype)

    @torch.inference_mode()
    def forward(self, ids: Sequence[Sequence[int]], caches: Sequence[KVCache]) -> NDArray[np.float32]:
        """Return the logits of the token after each text: float32 (len(ids), V).

        Raises:
            UserError: a token or a position that the model does not have.
        """
        check_step(ids, [cache.length for cache in caches], self.model.lm_head.out_features, self.max_length)
        with self._lock if self._shared else contextlib.nullcontext():
            training = self.model.training
            if training:
                self.model.eval()
            try:
                logits = torch.stack([self._next(row, cache) for row, cache in zip(ids, caches, strict=True)])
            finally:
                if training:
                    self.model.train()
        return logits.float().cpu().numpy()

    def _next(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        hidden = self.model.model(torch.tensor([list(ids)], device=self.device), cache)
        return self.model.lm_head(hidden[0, -1])  # the head of the last position alone: it is half of the work
