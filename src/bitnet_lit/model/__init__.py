"""This package has the network: its layers, the decoder, the key/value cache, and the count of parameters and FLOPs.

`tensors.py` describes the network without torch. So a name is imported when it is first used, and a command that only
reads a model folder does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet_lit.model.kv_cache import KVCache
    from bitnet_lit.model.loss import next_token_loss
    from bitnet_lit.model.transformer import CausalLM, batch_loss, build_model, token_losses

__all__ = ["CausalLM", "KVCache", "batch_loss", "build_model", "next_token_loss", "token_losses"]
_HOMES = {
    "CausalLM": "bitnet_lit.model.transformer",
    "KVCache": "bitnet_lit.model.kv_cache",
    "batch_loss": "bitnet_lit.model.transformer",
    "build_model": "bitnet_lit.model.transformer",
    "next_token_loss": "bitnet_lit.model.loss",
    "token_losses": "bitnet_lit.model.transformer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
