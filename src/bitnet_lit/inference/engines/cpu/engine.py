"""The native CPU engine computes a whole step, from token ids to logits, in one call of compiled code.

`NativeModel` is a model in memory: its projections packed into the layout of the kernels (2 bits a weight, 1.67 with
AVX2), its output head rounded to int8 or int4 or kept in float. Tokens that could be the likeliest one get their
logits from the head's own float rows, so greedy decoding is that of a float head. csrc/README.md draws one decode step
and says what is exact. `CpuEngine` is a `NativeModel` as generation uses engines.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.errors import ModelError, UserError
from bitnet_lit.inference.engines import check_step
from bitnet_lit.inference.engines.cpu import native
from bitnet_lit.inference.engines.cpu.cores import physical_cores
from bitnet_lit.inference.engines.cpu.weights import Weights
from bitnet_lit.model.tensors import EMBEDDING, FINAL_NORM, HEAD

HEAD_IN_CACHE = 16 * 2**20
"""Bytes of an int8 head. A smaller one may stay in the processor's caches, where 4 bits would be no faster than 8."""
HEAD_BITS = {"int4": 4, "int8": 8, "float": 32}
CACHE_TYPES = ("float", "half", "int8")
"""`CacheType` of csrc/kv_cache.h."""
MAX_STEP_TOKENS = 512
"""A longer prompt is several steps, so that activations stay in the processor's cache."""


class NativeModel:
    """Holds a model in memory, and the compiled engine that runs it. Many texts can share one.

    Args:
        stored: a model that `supported_models.why_unsupported` has nothing against.
            Its file stays open: the embedding is read from it.
        head: how the output head is computed: "int4", "int8", "float", or "auto", which takes int4 where an int8
            head is larger than the processor's caches.
        kv_cache: how keys and values are kept: "half" (float16), "float" or "int8".
        threads: None for one on each physical core.

    Raises:
        UserError: the stored weights are damaged.
        ModelError: not enough memory.
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
            head = "int4" if config.hidden_size * config.vocabulary > HEAD_IN_CACHE else "int8"
        head_name = HEAD if HEAD in stored.tensors else EMBEDDING
        others = native.Weights(norm=weights.vector(FINAL_NORM))
        if head == "float":
            others.head = weights.projection(head_name)
        else:
            others.head_codes, others.head_panels, others.head_int8_rows = weights.integer_head(
                head_name, HEAD_BITS[head]
            )
            others.head_rows = weights.row_table(head_name)
        others.embedding = weights.row_table(EMBEDDING)
        shape = native.Shape(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_size,
            ffn=config.intermediate_size,
            vocab=config.vocab_size,
            pieces=stored.pieces,
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
        for field, name in native.VECTORS.items():
            setattr(layer, field, self._weights.vector(prefix + name))
        if layer.value_gate:
            layer.value_table = self._weights.row_table(prefix + native.VALUE_TABLE)
        for field, name in native.PROJECTIONS.items():
            setattr(layer, field, self._weights.projection(prefix + name))
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
        """Return the bytes that a decode step reads after `length` tokens: weights, head, keys and values."""
        return self._weights.bytes_per_token + native.library().bitnet_cache_bytes(self.address, length)

    def new_cache(self) -> Cache:
        """Return an empty cache, for a new text."""
        return Cache(self, self._made(native.library().bitnet_cache_new()), 0)

    def step(self, tokens: Sequence[int], caches: Sequence[Cache], wanted: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens[i] to the text of caches[i].

        Several threads may call it at once, each with caches of its own.

        Args:
            tokens: ids within the vocabulary, at positions within the context: `check_step` checks both.
            caches: one for each token; a cache that is named several times gets the tokens in their order.
            wanted: indices of the tokens whose logits are computed.

        Returns:
            Logits after each wanted token: float32 (len(wanted), V).

        Raises:
            ModelError: not enough memory. The texts of `caches` cannot go on.
            UserError: the model's file was shortened. The texts of `caches` cannot go on.
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
        if status == native.SHORT_READ:
            path = self._weights.stored.path
            raise UserError(f"{path}: its weights are shorter than when the model was opened: copy it again")
        if status:
            raise ModelError(f"not enough memory for a step of {len(ids)} tokens: take shorter or fewer texts")
        return logits


class Cache:
    """Holds the keys and values of one text on a `NativeModel`.

    Attributes:
        length: tokens in it.
    """

    def __init__(self, model: NativeModel, address: ctypes.c_void_p, length: int) -> None:
        self.model, self.address, self.length = model, address, length
        self._free = native.library().bitnet_cache_free

    def fork(self) -> Cache:
        """Return a copy, for another text that begins in the same way."""
        copy = native.library().bitnet_cache_fork(self.model.address, self.address)
        return Cache(self.model, self.model._made(copy), self.length)

    def truncate(self, length: int) -> None:
        """Remove every token from position `length` on."""
        native.library().bitnet_cache_truncate(self.address, length)
        self.length = min(self.length, length)

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._free(self.address)


class CpuEngine:
    """Runs a `NativeModel` as an `inference.engines.Engine`."""

    texts_at_once = 8  # more would gain little

    def __init__(self, model: NativeModel) -> None:
        self.model = model
        self.name = f"native, {native.library().bitnet_simd().decode()}, {model.threads} threads"
        self.max_length = model.config.max_position_embeddings

    def __str__(self) -> str:
        return self.name

    def new_cache(self) -> Cache:
        """Return an empty cache."""
        return self.model.new_cache()

    def forward(self, ids: Sequence[Sequence[int]], caches: Sequence[Cache]) -> NDArray[np.float32]:
        """Return the logits of the token after each text: float32 (len(ids), V).

        Raises:
            UserError: a token beyond the vocabulary, a text beyond the context, or a model whose file was shortened.
            ModelError: not enough memory.
        """
        check_step(ids, [cache.length for cache in caches], self.model.config.vocabulary, self.max_length)
        tokens = [token for row in ids for token in row]
        owners = [cache for row, cache in zip(ids, caches, strict=True) for _ in row]
        last = np.cumsum([len(row) for row in ids]) - 1
        parts = []
        for start in range(0, len(tokens), MAX_STEP_TOKENS):
            end = start + MAX_STEP_TOKENS
            wanted = last[(start <= last) & (last < end)] - start
            parts.append(self.model.step(tokens[start:end], owners[start:end], wanted.tolist()))
        return np.concatenate(parts)
