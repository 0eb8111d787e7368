"""The native CPU engine: a BitNet's whole step in one call of compiled code.

Weights are packed at load into the layout of the kernels (packing.h): 2 bits a projection weight, 1.67 with AVX2;
latent weights are not kept. The output head, half of a small model's bytes, has rows of 8 bits with a scale each, of 4
bits for all rows and 8 for the likely ones, or of floats. Rows that could be the likeliest token's, within six standard
deviations of the rounding's error, are computed again from the floats (head.h).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.errors import ModelError
from bitnet_lit.inference.engines import check_step
from bitnet_lit.inference.engines.cpu import native
from bitnet_lit.inference.engines.cpu.cores import physical_cores
from bitnet_lit.inference.engines.cpu.weights import Weights
from bitnet_lit.model.tensors import EMBEDDING, HEAD

PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {
    "input_norm": "input_layernorm",
    "attn_norm": "self_attn.attn_sub_norm",
    "post_norm": "post_attention_layernorm",
    "ffn_norm": "mlp.ffn_sub_norm",
}
HEAD_IN_CACHE = 16 * 2**20  # bytes of int8 rows that a processor's caches may hold: half of them gain nothing there
HEAD_BITS = {"int4": 4, "int8": 8, "float": 32}
CACHE_TYPES = ("float", "half", "int8")  # `CacheType` of cache.h
ROWS_AT_ONCE = 512  # tokens of a long prompt in one step: their activations stay in the cache


class NativeModel:
    """Packed weights and the compiled engine on them; many texts can share one.

    Args:
        stored: a model that `supported_models.why_unsupported` has nothing against.
        head: "int4", "int8", "float", or "auto": int4 where int8 rows are larger than caches are.
        kv_cache: "half" (float16), "float" or "int8".
        threads: None for one on each physical core.

    Raises:
        UserError: stored codes that are none.
    """

    def __init__(
        self, stored: StoredModel, head: str = "auto", kv_cache: str = "half", threads: int | None = None
    ) -> None:
        config = self.config = stored.config
        self.threads = threads or physical_cores()
        weights = self._weights = Weights(stored)
        layers = (native.Layer * config.num_hidden_layers)(
            *(self._layer(f"model.layers.{i}.") for i in range(config.num_hidden_layers))
        )
        if head == "auto":
            head = "int4" if config.hidden_size * (config.vocabulary) > HEAD_IN_CACHE else "int8"
        head_name = HEAD if HEAD in stored.tensors else EMBEDDING
        others = native.Weights(embedding=weights.table(EMBEDDING), norm=weights.vector("model.norm.weight"))
        if head == "float":
            others.head = weights.projection(head_name)
        else:
            others.head = weights.table(head_name)
            others.head_codes, others.head_rows, others.head_fine = weights.integer_head(head_name, HEAD_BITS[head])
        weights.done()
        shape = native.Shape(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_size,
            ffn=config.intermediate_size,
            vocab=config.vocab_size,
            context=config.max_position_embeddings,
            relu2=config.hidden_act == "relu2",
            dense=not stored.quant.scheme.quantizes,
            head_bits=HEAD_BITS[head],
            cache_type=CACHE_TYPES.index(kv_cache),
            threads=self.threads,
            eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
        )
        self._free = native.library().bitnet_free
        self.address = self._made(native.library().bitnet_new(shape, layers, others))

    def _layer(self, prefix: str) -> native.Layer:
        layer = native.Layer()
        for field, name in NORMS.items():
            setattr(layer, field, self._weights.vector(f"{prefix}{name}.weight"))
        for field, name in PROJECTIONS.items():
            setattr(layer, field, self._weights.projection(f"{prefix}{name}.weight"))
        return layer

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._free(self.address)  # held by the object: at the end of the interpreter modules may be empty

    @staticmethod
    def _made(address: int | None) -> ctypes.c_void_p:
        if not address:
            raise ModelError("not enough memory for another text")
        return ctypes.c_void_p(address)

    def bytes_per_token(self, length: int) -> int:
        """What a decode step reads from memory after `length` tokens: weights, head, keys and values."""
        return self._weights.bytes_per_token + native.library().bitnet_cache_bytes(self.address, length)

    def new_cache(self) -> Cache:
        """The past of a new text."""
        return Cache(self, self._made(native.library().bitnet_cache_new()), 0)

    def step(self, tokens: Sequence[int], caches: Sequence[Cache], wanted: Sequence[int]) -> NDArray[np.float32]:
        """Put tokens[i], which the caller has checked, to the end of caches[i], whose texts are the caller's own.

        Returns:
            Logits of the rows named in `wanted`: float32 (len(wanted), V).

        Raises:
            ModelError: not enough memory; the texts of `caches` cannot go on.
        """
        vocab = self.config.vocabulary
        ids = np.array(tokens, dtype=np.int32)
        addresses = np.array([cache.address.value for cache in caches], dtype=np.uintp)
        rows = np.array(wanted, dtype=np.int32)
        logits = np.empty((len(wanted), vocab), dtype=np.float32)
        for cache in caches:
            cache.length += 1
        status = native.library().bitnet_step(
            self.address,
            len(ids),
            ids.ctypes.data,
            addresses.ctypes.data,
            len(rows),
            rows.ctypes.data,
            logits.ctypes.data,
        )
        if status:
            raise ModelError(f"not enough memory for a step of {len(ids)} tokens: take shorter or fewer texts")
        return logits


class Cache:
    """Keys and values of one text on a `NativeModel`.

    Attributes:
        length: tokens behind it.
    """

    def __init__(self, model: NativeModel, address: ctypes.c_void_p, length: int) -> None:
        self.model, self.address, self.length = model, address, length
        self._free = native.library().bitnet_cache_free

    def fork(self) -> Cache:
        """A cache of its own with the same past: several texts from one prompt."""
        copy = native.library().bitnet_cache_fork(self.model.address, self.address)
        return Cache(self.model, self.model._made(copy), self.length)

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on."""
        native.library().bitnet_cache_truncate(self.address, length)
        self.length = min(self.length, length)

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._free(self.address)


class CpuEngine:
    """A `NativeModel` as an `inference.engines.Engine`."""

    def __init__(self, model: NativeModel) -> None:
        self.model = model
        self.name = f"native, {native.library().bitnet_simd().decode()}, {model.threads} threads"
        self.max_length = model.config.max_position_embeddings

    def new_cache(self) -> Cache:
        """An empty past."""
        return self.model.new_cache()

    def forward(self, ids: Sequence[Sequence[int]], caches: Sequence[Cache]) -> NDArray[np.float32]:
        """Logits of the token after each text: float32 (len(ids), V).

        Raises:
            UserError: a token or a position that the model does not have.
        """
        check_step(ids, [cache.length for cache in caches], self.model.config.vocabulary, self.max_length)
        tokens = [token for row in ids for token in row]
        owners = [cache for row, cache in zip(ids, caches, strict=True) for _ in row]
        last = np.cumsum([len(row) for row in ids]) - 1
        parts = []
        for start in range(0, len(tokens), ROWS_AT_ONCE):
            end = start + ROWS_AT_ONCE
            wanted = last[(start <= last) & (last < end)] - start
            parts.append(self.model.step(tokens[start:end], owners[start:end], wanted.tolist()))
        return np.concatenate(parts)
