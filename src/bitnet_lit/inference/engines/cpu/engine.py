"""The native CPU engine: a BitNet's whole step in one call of compiled code.

Weights are packed at load into the layout of the kernels (kernels.h): 2 bits a projection weight; latent weights are
not kept. The output head, half of a small model's bytes, is int8 with a scale for each row (`head="int8"`) or float32
(`head="float"`); its activations have 16 bits, so the rounding of its weights is its whole error, and tokens that could
be the likeliest but for that are computed exactly.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet_lit.artifacts.source import EMBEDDING, HEAD, Source
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.inference.engines.cpu import native

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
ALIGN = 64
PIECE = 64 * 2**20
PADDED = 64  # inputs of activations and of the head are padded to a multiple, as `padded` in engine.cpp does


class Arena:
    """Memory for weights in large pieces, on huge pages where the system has them: a step walks through all of it, and
    would meet the end of a 4 KiB page at every turn."""

    def __init__(self) -> None:
        self._piece, self._used = mmap.mmap(-1, ALIGN), ALIGN

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Zeros that begin at a multiple of a cache line."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if self._used + size > len(self._piece):
            self._piece, self._used = mmap.mmap(-1, max(size, PIECE)), 0
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._piece.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(self._piece, dtype=dtype, count=int(np.prod(shape)), offset=self._used)
        self._used += -(-size // ALIGN) * ALIGN
        return array.reshape(shape)


def pack(codes: NDArray[np.int8], arena: Arena) -> NDArray[np.uint8]:
    """int8 (O, I) codes in {-1, 0, +1} to the layout of the kernels."""
    codes = np.ascontiguousarray(codes, dtype=np.int8)
    packed = arena.take((native.library().bitnet_packed_bytes(*codes.shape),), np.uint8)
    native.library().bitnet_pack(codes.ctypes.data, *codes.shape, packed.ctypes.data)
    return packed


def quantize_head(weight: NDArray[np.float32], arena: Arena) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """float32 (V, D) to int8 (V, D padded) and a scale for each row, float32 (V,)."""
    rows, inputs = weight.shape
    scales = np.maximum(np.abs(weight).max(axis=1), 1e-12) / np.float32(127)
    codes = arena.take((rows, -(-inputs // PADDED) * PADDED), np.int8)
    codes[:, :inputs] = np.rint(weight / scales[:, None])
    return codes, scales.astype(np.float32)


def supports(config: ModelConfig, quant: QuantConfig) -> str | None:
    """Why the engine cannot run a model; None when it can."""
    if quant.name == "none":
        return "its weights are dense"
    if quant.activation_bits != 8 or quant.skip != ["lm_head"]:
        return "its projections are not all ternary with 8-bit activations"
    if config.qkv_bias or config.qk_norm:
        return "it has biases or norms on queries and keys"
    return None


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once where the system says which they are."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in usable:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
                siblings.add(file.read().strip())
        except OSError:
            return len(usable)
    return len(siblings)


class NativeModel:
    """Packed weights and the compiled engine on them; several texts can share one.

    Args:
        source: a BitNet that `supports` allows.
        head: "int8" or "float".
        threads: None for one on each physical core.

    Attributes:
        bytes_per_token: weights that a decode step reads: packed projections and the head.
    """

    def __init__(self, source: Source, head: str = "int8", threads: int | None = None) -> None:
        config = self.config = source.config
        self.threads = threads or physical_cores()
        self._arena = Arena()
        self._kept: list[NDArray[Any]] = []  # what the engine points to
        layers = (native.Layer * config.num_hidden_layers)(
            *(self._layer(source, f"model.layers.{i}.") for i in range(config.num_hidden_layers))
        )
        embedding = self._vector(source, EMBEDDING)
        weights = native.Weights(embedding=embedding, norm=self._vector(source, "model.norm.weight"))
        weights.head = self._vector(source, HEAD) if HEAD in source.tensors else embedding
        self.bytes_per_token = sum(array.nbytes for array in self._kept if array.dtype == np.uint8)
        head_values = (config.vocab_size or 0) * config.hidden_size
        self.bytes_per_token += head_values * (1 if head == "int8" else 4)
        if head == "int8":
            codes, scales = quantize_head(
                source.tensor(HEAD if HEAD in source.tensors else EMBEDDING).numpy(), self._arena
            )
            self._kept += [codes, scales]
            weights.head_codes, weights.head_scales = codes.ctypes.data, scales.ctypes.data
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
            sub_norm=config.sub_norm,
            head_int8=head == "int8",
            threads=self.threads,
            eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
        )
        self._engine = ctypes.c_void_p(native.library().bitnet_new(shape, layers, weights))

    def _vector(self, source: Source, name: str) -> int:
        """Keep a dense tensor; returns its address."""
        values = np.ascontiguousarray(source.tensor(name).numpy(), dtype=np.float32)
        self._kept.append(values)
        return values.ctypes.data

    def _layer(self, source: Source, prefix: str) -> native.Layer:
        layer = native.Layer()
        for field, name in NORMS.items():
            if f"{prefix}{name}.weight" in source.tensors:
                setattr(layer, field, self._vector(source, f"{prefix}{name}.weight"))
        for field, name in PROJECTIONS.items():
            codes, scale = source.codes(f"{prefix}{name}.weight")
            packed = pack(codes.numpy(), self._arena)
            self._kept.append(packed)
            setattr(layer, field, native.Linear(packed.ctypes.data, float(scale)))
        return layer

    def __del__(self) -> None:
        if getattr(self, "_engine", None):
            native.library().bitnet_free(self._engine)

    def step(self, tokens: Sequence[int], caches: Sequence[Cache], wanted: Sequence[int]) -> NDArray[np.float32]:
        """Put tokens[i] to the end of caches[i]; logits of the rows named in `wanted`, float32 (len(wanted), V)."""
        vocab = self.config.vocab_size or 0
        assert all(0 <= token < vocab for token in tokens), "a token beyond the vocabulary"
        ids = np.array(tokens, dtype=np.int32)
        addresses = np.array([cache.address for cache in caches], dtype=np.uintp)
        rows = np.array(wanted, dtype=np.int32)
        logits = np.empty((len(wanted), vocab), dtype=np.float32)
        native.library().bitnet_step(
            self._engine,
            len(ids),
            ids.ctypes.data,
            addresses.ctypes.data,
            len(rows),
            rows.ctypes.data,
            logits.ctypes.data,
        )
        for cache in caches:
            cache.length += 1
        return logits


class Cache:
    """Keys and values of one text.

    Attributes:
        length: tokens behind it.
    """

    def __init__(self) -> None:
        self.address: int = native.library().bitnet_cache_new()
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on."""
        native.library().bitnet_cache_truncate(self.address, length)
        self.length = min(self.length, length)

    def __del__(self) -> None:
        if getattr(self, "address", None):
            native.library().bitnet_cache_free(self.address)


class CpuEngine:
    """One text at a time on a `NativeModel`; see `inference.engines.Engine`."""

    def __init__(self, model: NativeModel) -> None:
        self.model = model
        self.name = f"native, {native.library().bitnet_simd().decode()}, {model.threads} threads"
        self.max_length = model.config.max_position_embeddings
        self._cache = Cache()

    @property
    def length(self) -> int:
        """Tokens behind it."""
        return self._cache.length

    def reset(self) -> None:
        """Forget the past."""
        self._cache.truncate(0)

    def forward(self, ids: list[int]) -> Tensor:
        """Logits of the token after `ids`: float32 (V,)."""
        assert self.length + len(ids) <= self.max_length, f"{self.length + len(ids)} tokens in {self.max_length}"
        return torch.from_numpy(self.model.step(ids, [self._cache] * len(ids), [len(ids) - 1])[0])
