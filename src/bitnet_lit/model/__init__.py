"""The network: layers, the decoder built from them, its cache, and the accounting of its size."""

from bitnet_lit.model.kv_cache import KVCache
from bitnet_lit.model.transformer import CausalLM, build_model, next_token_loss

__all__ = ["CausalLM", "KVCache", "build_model", "next_token_loss"]
