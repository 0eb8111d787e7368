"""The network on a GPU goes from token ids to logits by a sequence of kernel launches.

One token of one text takes five kernels a layer: norm + round + q, k, v; rotate + append + attention; norm + round + o;
norm + round + gate, up + activation; norm + round + down. Several tokens take nine: rounding is a kernel of its own
then, because each program of a product would have to round all of them.

`decode` takes one new token of each text, whose addresses and positions are tensors on the GPU, and never asks the host
for anything: it can be captured in a CUDA graph. `prefill` takes many tokens of some texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import ModelConfig
from bitnet_lit.inference.engines.cuda.gpu_features import early
from bitnet_lit.inference.engines.cuda.head import DenseHead, Head, Int8Head
from bitnet_lit.inference.engines.cuda.kernels.attention import attend, rotate
from bitnet_lit.inference.engines.cuda.kernels.elementwise import embed
from bitnet_lit.inference.engines.cuda.projection import DenseProjection, Projection, TernaryProjection
from bitnet_lit.model.layers import rotary_tables
from bitnet_lit.model.tensors import EMBEDDING, FINAL_NORM, HEAD
from bitnet_lit.quant.packing import CODES_PER_BYTE, unpack_codes

BLOCK = 64
"""The fewest positions that one program of `attend` reads. A longer past is divided among several programs."""
MOST_SPLITS = 16
PROGRAMS = 512  # of `attend`: about four for each multiprocessor


@dataclass
class Texts:
    """Says where the texts of a step stand: int64 (M,) on the GPU, one for each token.

    Attributes:
        address: of the text's cache.
        room: positions that the cache has memory for.
        position: of the token; negative in rows of a decode step without a text.
    """

    address: Tensor
    room: Tensor
    position: Tensor


@dataclass
class Layer:
    """Is a decoder layer. Norms are None where the network has none."""

    qkv: Projection
    o: Projection
    gate_up: Projection
    down: Projection
    norms: dict[str, Tensor | None]


class Network:
    """Has the weights of a model on a GPU, and runs steps through them.

    Args:
        stored: a model that `supported_models.why_unsupported` has nothing against.
        device: the GPU.
        head: "int8" or "float".
        half: whether keys and values are kept as float16, or else as float32.
    """

    def __init__(self, stored: StoredModel, device: torch.device, head: str, half: bool) -> None:
        config = self.config = stored.config
        self.device, self.half = device, half
        self._stored = stored
        self.layers = [self._layer(f"model.layers.{i}.") for i in range(config.num_hidden_layers)]
        self.embedding = self._table(EMBEDDING)
        self.head = self._head(head)
        self.cos, self.sin = (table.to(device) for table in rotary_tables(config))

    def _vector(self, name: str) -> Tensor | None:
        return self._stored.tensor(name).to(self.device) if name in self._stored.tensors else None

    def _table(self, name: str) -> Tensor:
        """Return a dense matrix in the dtype that holds its stored numbers: bfloat16 where they are stored so."""
        place = self._stored.reader.place(name)
        table = self._stored.tensor(name).to(self.device)
        return table.bfloat16() if place is not None and place.dtype == "<u2" else table

    def _projection(self, prefix: str, names: Sequence[str]) -> Projection:
        """Return several linear layers of one input as one."""
        stored, eps = self._stored, self.config.rms_norm_eps
        biases = [self._vector(f"{prefix}{name}.bias") for name in names]
        bias = None if biases[0] is None else torch.cat([one for one in biases if one is not None])
        weights = [f"{prefix}{name}.weight" for name in names]
        if not stored.quant.scheme.quantizes:
            matrix = torch.cat([stored.tensor(name).to(self.device) for name in weights]).bfloat16()
            return DenseProjection(matrix, None if bias is None else bias.bfloat16(), eps)
        codes, scales = [], []
        for name in weights:
            if stored.holds_codes(name) and stored.tensors[name][0] % CODES_PER_BYTE == 0:
                packed, scale = stored.packed_codes(name)
                code = unpack_codes(packed.to(self.device))  # a quarter of the bytes to send, and faster there
            else:
                code, scale = stored.codes(name)
                code = code.to(self.device)
            codes.append(code)
            scales.append(scale.to(self.device).reshape(-1).expand(len(code)))
        limit = 2 ** (stored.quant.scheme.activations.bits - 1) - 1
        return TernaryProjection.from_codes(torch.cat(codes), torch.cat(scales), bias, limit, eps)

    def _layer(self, prefix: str) -> Layer:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        norms = {
            "input": f"{prefix}input_layernorm",
            "query": f"{attention}q_norm",
            "key": f"{attention}k_norm",
            "attention": f"{attention}attn_sub_norm",
            "post_attention": f"{prefix}post_attention_layernorm",
            "ffn": f"{mlp}ffn_sub_norm",
        }
        return Layer(
            qkv=self._projection(attention, ("q_proj", "k_proj", "v_proj")),
            o=self._projection(attention, ("o_proj",)),
            gate_up=self._projection(mlp, ("gate_proj", "up_proj")),
            down=self._projection(mlp, ("down_proj",)),
            norms={key: self._vector(f"{name}.weight") for key, name in norms.items()},
        )

    def _head(self, kind: str) -> Head:
        norm = self._vector(FINAL_NORM)
        assert norm is not None, "every network has a final norm"
        rows = self._table(HEAD) if HEAD in self._stored.tensors else self.embedding
        if not self._stored.quant.scheme.quantizes:
            return DenseHead(rows.bfloat16(), norm, self.config.rms_norm_eps)
        if kind == "float":
            return DenseHead(rows.float(), norm, self.config.rms_norm_eps)
        return Int8Head.from_rows(rows, norm, self.config.rms_norm_eps, self._stored.pieces)

    def _run(self, tokens: Tensor, attention: Any) -> Tensor:
        """Return the hidden states, float32 (M, D), of tokens int64 (M,)."""
        config = self.config
        x = torch.empty(len(tokens), config.hidden_size, dtype=torch.float32, device=self.device)
        block_k = triton.next_power_of_2(config.hidden_size)
        embed[(len(tokens),)](x, tokens, self.embedding, K=config.hidden_size, BLOCK_K=block_k, **early(self.device))
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(x, layer.norms["input"])
            layer.o(attention(index, layer, qkv), layer.norms["attention"], add_to=x)
            hidden, act = layer.gate_up.gated(x, layer.norms["post_attention"], config.hidden_act)
            layer.down(hidden, layer.norms["ffn"], act=act, add_to=x)
        return x

    def _heads(self) -> dict[str, Any]:
        config = self.config
        return {
            "H": config.num_attention_heads,
            "KV": config.num_kv_heads,
            "P": config.head_size,
            "BLOCK_P": max(16, triton.next_power_of_2(config.head_size)),
            "HALF": self.half,
            "QK_NORM": config.qk_norm,
        }

    def decode(self, tokens: Tensor, texts: Texts, reach: int, scratch: Scratch, logits: Tensor) -> None:
        """Compute the logits after one new token of each text.

        Args:
            tokens: int64 (B,).
            texts: one for each token; positions are below `reach`, a power of two from BLOCK on.
            scratch: for attention, of the same reach.
            logits: float32 (B, V), out.
        """
        heads = self._heads()
        config = self.config
        block_g = max(16, triton.next_power_of_2(config.num_attention_heads // config.num_kv_heads))
        splits = scratch.splits
        # Two blocks are in registers at once, so programs of several blocks take small ones.
        small = max(16, min(BLOCK, (4096 if self.half else 2048) // heads["BLOCK_P"]))
        block_c = BLOCK if self.half and reach // splits == BLOCK else small
        warps = 8 if block_c * heads["BLOCK_P"] > 4096 else 4

        def attention(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            y = torch.empty(len(qkv), config.attention_size, dtype=torch.float32, device=self.device)
            q_norm, k_norm = layer.norms["query"], layer.norms["key"]
            attend[(len(qkv), config.num_kv_heads, splits)](
                y, qkv, self.cos, self.sin, self.cos if q_norm is None else q_norm,
                self.cos if k_norm is None else k_norm, texts.address, texts.room, texts.position,
                scratch.partial, scratch.counter, index, reach // splits, config.head_size**-0.5, config.rms_norm_eps,
                BLOCK_C=block_c, BLOCK_G=block_g, num_warps=warps, **heads,
                **early(self.device),
            )  # fmt: skip
            return y

        self.head(self._run(tokens, attention), logits)

    def prefill(self, tokens: Tensor, texts: Texts, stretches: Sequence[Stretch]) -> Tensor:
        """Return the hidden states float32 (M, D) of many tokens; their keys and values are put into the caches.

        Args:
            tokens: int64 (M,), those of one text behind those of the other.
            texts: one for each token.
            stretches: where the tokens of each text are.
        """
        heads, config = self._heads(), self.config

        def attention(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            q_norm, k_norm = layer.norms["query"], layer.norms["key"]
            dtype = torch.float16 if self.half else torch.float32
            q = torch.empty(len(qkv), config.num_attention_heads, config.head_size, dtype=dtype, device=self.device)
            rotate[(len(qkv), config.num_attention_heads + 2 * config.num_kv_heads)](
                q, qkv, self.cos, self.sin, self.cos if q_norm is None else q_norm,
                self.cos if k_norm is None else k_norm, texts.address, texts.room, texts.position, index,
                config.rms_norm_eps, num_warps=1, **heads,
            )  # fmt: skip
            return torch.cat([stretch.attention(q, index, config) for stretch in stretches]).flatten(1).float()

        return self._run(tokens, attention)


@dataclass
class Stretch:
    """Is the tokens of one text in a prefill step.

    Attributes:
        start: the first of them in the step.
        count: how many.
        past: tokens of the text before them.
        memory: the text's cache: (layers, 2, KV, room, P).
    """

    start: int
    count: int
    past: int
    memory: Tensor

    def attention(self, q: Tensor, layer: int, config: ModelConfig) -> Tensor:
        """Return what the text's queries, of those of the step (M, H, P), attend to: (count, H, P)."""
        q = q[self.start : self.start + self.count].transpose(0, 1)[None]
        end = self.past + self.count
        keys, values = self.memory[layer, :, :, :end].unsqueeze(1)
        mask = None
        if self.past and self.count > 1:  # is_causal would align the mask at position 0
            mask = torch.ones(self.count, end, dtype=torch.bool, device=q.device).tril(self.past)
        groups = config.num_attention_heads // config.num_kv_heads
        keys, values = (one.repeat_interleave(groups, dim=1) if groups > 1 else one for one in (keys, values))
        causal = mask is None and self.count > 1
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal)[0].transpose(0, 1)


class Scratch:
    """Is memory in which the programs of `attend` leave parts to each other.

    Attributes:
        splits: among how many programs the past of a text is divided: as many as the GPU has room for.
    """

    def __init__(self, config: ModelConfig, rows: int, reach: int, device: torch.device) -> None:
        groups = config.num_attention_heads // config.num_kv_heads
        block_p = max(16, triton.next_power_of_2(config.head_size))
        room = max(1, PROGRAMS // (rows * config.num_kv_heads))
        self.splits = min(reach // BLOCK, MOST_SPLITS, 1 << (room.bit_length() - 1))
        self.partial = torch.empty(rows, config.num_kv_heads, self.splits, groups, block_p + 2, device=device)
        self.counter = torch.zeros(rows, config.num_kv_heads, dtype=torch.int32, device=device)
