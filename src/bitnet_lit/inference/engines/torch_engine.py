"""The PyTorch engine: runs everywhere, and is the reference for the others."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from bitnet_lit.model import CausalLM, KVCache
from bitnet_lit.quant import pack_linears


class TorchEngine:
    """Wraps a `CausalLM` with a cache.

    Args:
        model: left as it is.
        pack: freeze the quantized layers to integer codes first, so that weights are not quantized again at every
            token: the same integers, several times faster. False shares the model's own layers, for a look at a
            model in training.
    """

    def __init__(self, model: CausalLM, pack: bool = True) -> None:
        self.name = "PyTorch"
        self.device = model.model.embed_tokens.weight.device
        if pack:
            model = copy.deepcopy(model)
            pack_linears(model)
            model.eval()
        self.model = model
        self.max_length = model.config.max_position_embeddings
        self._cache = KVCache(model.config, 1, self.max_length, self.device)

    @property
    def length(self) -> int:
        """Tokens behind it."""
        return self._cache.length

    def reset(self) -> None:
        """Forget the past."""
        self._cache.truncate(0)

    @torch.inference_mode()
    def forward(self, ids: list[int]) -> Tensor:
        """Logits of the token after `ids`: float32 (V,) on the CPU."""
        batch = torch.tensor([ids], device=self.device)
        training = self.model.training
        self.model.eval()
        hidden = self.model.model(batch, self._cache)
        logits = self.model.lm_head(hidden[:, -1])  # the head of the last position alone: it is half of the work
        self.model.train(training)
        return logits[0].float().cpu()
