"""This module has the parts of a decoder layer. They are dense here: quantization is a pass over the finished network.

A layer computes in the order of BitNet b1.58 2B4T, as Hugging Face and llama.cpp do::

    x -> input_layernorm -> q, k, v -> rotary -> causal attention -> attn_sub_norm -> o_proj -> + x
      -> post_attention_layernorm -> act(gate) * up -> ffn_sub_norm -> down_proj -> + x

What enters a layer may be r * x + s * x0, with x0 the embedding and two learned numbers (`residual_scales`,
`x0_scales`), and a row of a further embedding may be added to the values (`ValueEmbedding`).

Every projection has a norm right before it, because int8 activations have one scale per token: where one value of a
token is much larger than the others, these are rounded to zero. Without the two sub-norms this is a Llama layer.

Projections that read the same normed input are called together, so that kernels can compute them with the norm before
them (normed_linears.py).

Axis letters: B batch, T time, D hidden, H attention heads, K key/value heads, P head_dim, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_lit.config import ModelConfig
from bitnet_lit.model.kv_cache import KVCache
from bitnet_lit.model.normed_linears import RMSNorm, as_norm, joint_kernels, normed_linears
from bitnet_lit.quant.bit_linear import BitLinear
from bitnet_lit.quant.kernels.choose import are_alike, are_unobserved


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position, each float32 (max_position_embeddings, P).

    The layout is Hugging Face's: elements i and i + P/2 of a head have the same angle.
    """
    exponents = torch.arange(0, config.head_size, 2).float() / config.head_size
    inverse_frequency = 1.0 / config.rope_theta**exponents
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), inverse_frequency)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + P/2) of each head by the angles of its position; x (B, H, T, P), cos and sin (T, P)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class ValueEmbedding(nn.Module):
    """A ValueEmbedding adds a row of a table to the values of each token: v + 2 * sigmoid(gate(x)) * table[id].

    Each key/value head has a gate, a product with the first elements of what the projections read. The source is
    nanochat's gpt.py, after ResFormer (arXiv 2410.17897) and modded-nanogpt. There the table starts at random numbers;
    here it starts at zero, so that the network first computes what it computes without it. The gate starts at zero as
    there, where its factor is 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.num_kv_heads, config.value_gate_inputs))
        zeros = torch.zeros(config.vocabulary, config.kv_size)  # given, so that no random numbers are drawn
        self.table = nn.Embedding(config.vocabulary, config.kv_size, _weight=zeros)

    def forward(self, v_BKTP: Tensor, normed_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        gate_BTK = 2 * torch.sigmoid(F.linear(normed_BTD[..., : self.gate.shape[1]], self.gate))
        rows_BTKP = self.table(ids_BT).unflatten(-1, (self.gate.shape[0], -1))
        added: Tensor = (gate_BTK[..., None] * rows_BTKP).transpose(1, 2)
        return v_BKTP + added.to(v_BKTP.dtype)


class Attention(nn.Module):
    """Attention is causal self-attention with grouped queries; x (B, T, D) -> (B, T, D).

    The norm before it is an argument, because its projections compute it. The token ids, (B, T), are read where there
    is a value embedding.
    """

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_size
        self.dropout = config.dropout
        size, kv_size = config.attention_size, config.kv_size
        self.q_proj = nn.Linear(config.hidden_size, size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.value_embed = ValueEmbedding(config) if config.has_value_embedding(layer_index) else None
        self.attn_sub_norm = RMSNorm(size, config.rms_norm_eps) if config.sub_norm else nn.Identity()
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        heads: Tensor = x_BTD.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)

    def _rotated_heads(self, x_BTD: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries (B, H, T, P), rotated keys and values (B, K, T, P)."""
        qkv = cast(list[BitLinear], [self.q_proj, self.k_proj, self.v_proj])
        has_norms = isinstance(self.q_norm, RMSNorm)
        if not has_norms and (kernels := joint_kernels(x_BTD, [norm, self.q_norm, self.k_norm], qkv)) is not None:
            heads = kernels.rotated_heads(x_BTD, as_norm(norm), qkv, cos, sin)
            if heads is not None:
                return heads
        q, k, v = normed_linears(x_BTD, norm, *qkv)
        q_BHTP = apply_rotary(self.q_norm(self._heads(q)), cos, sin)
        k_BKTP = apply_rotary(self.k_norm(self._heads(k)), cos, sin)
        return q_BHTP, k_BKTP, self._heads(v)

    def is_plain(self) -> bool:
        """Return whether there are neither norms of heads nor a value embedding, and no dropout now."""
        has_dropout = bool(self.dropout) and self.training
        return not isinstance(self.q_norm, RMSNorm) and self.value_embed is None and not has_dropout

    def _self_attention(
        self, x_BTD: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor, cache: KVCache | None
    ) -> Tensor | None:
        """Return the heads' outputs (B, T, H * P) where kernels compute all of attention, otherwise None."""
        qkv = cast(list[BitLinear], [self.q_proj, self.k_proj, self.v_proj])
        if cache is not None or not self.is_plain():
            return None
        kernels = joint_kernels(x_BTD, [norm, self.q_norm, self.k_norm], qkv)
        return None if kernels is None else kernels.self_attention(x_BTD, as_norm(norm), qkv, cos, sin)

    def forward(
        self,
        x_BTD: Tensor,
        norm: nn.Module,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        ids_BT: Tensor | None = None,
    ) -> Tensor:
        length = x_BTD.shape[1]
        if (y_BTD := self._self_attention(x_BTD, norm, cos, sin, cache)) is not None:
            (output,) = normed_linears(y_BTD, self.attn_sub_norm, self.o_proj)
            return output
        q_BHTP, k_BKTP, v_BKTP = self._rotated_heads(x_BTD, norm, cos, sin)
        if self.value_embed is not None:
            v_BKTP = self.value_embed(v_BKTP, norm(x_BTD), ids_BT)
        mask, is_causal = None, length > 1
        if cache is not None:
            past = cache.length
            k_BKTP, v_BKTP = cache.append(self.layer_index, k_BKTP, v_BKTP)
            if past and length > 1:  # is_causal would align the mask at position 0: row t sees the past and 0..t
                mask = torch.ones(length, past + length, dtype=torch.bool, device=x_BTD.device).tril(past)
                is_causal = False
        y_BHTP = F.scaled_dot_product_attention(
            q_BHTP,
            k_BKTP,
            v_BKTP,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            enable_gqa=q_BHTP.shape[1] != k_BKTP.shape[1],
        )
        (output,) = normed_linears(y_BHTP.transpose(1, 2).flatten(-2), self.attn_sub_norm, self.o_proj)
        return output


def relu2(x: Tensor) -> Tensor:
    """Return relu(x)**2, the activation function of BitNet b1.58 2B4T."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu2": relu2}


class MLP(nn.Module):
    """MLP is the gated feed-forward layer; x (B, T, D) -> (B, T, F) -> (B, T, D).

    The norm before it is an argument, because its projections compute it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.ffn_sub_norm = RMSNorm(config.intermediate_size, config.rms_norm_eps) if config.sub_norm else nn.Identity()
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.hidden_act = config.hidden_act

    def forward(self, x_BTD: Tensor, norm: nn.Module) -> Tensor:
        linears = cast(list[BitLinear], [self.gate_proj, self.up_proj, self.down_proj])
        if (kernels := joint_kernels(x_BTD, [norm, self.ffn_sub_norm], linears)) is not None:
            *gate_up, down = linears
            output = kernels.gated_mlp(x_BTD, as_norm(norm), gate_up, self.hidden_act, as_norm(self.ffn_sub_norm), down)
            if output is not None:
                return output
        gate_BTF, up_BTF = normed_linears(x_BTD, norm, self.gate_proj, self.up_proj)
        y_BTF = ACTIVATIONS[self.hidden_act](gate_BTF) * up_BTF
        (output,) = normed_linears(y_BTF, self.ffn_sub_norm, self.down_proj)
        return output


def joint_layers(network: nn.Module) -> list[list[BitLinear]]:
    """Return the quantized layers of a network, in the groups in which kernels compute them."""
    groups: list[list[nn.Module]] = []
    for module in network.modules():
        if isinstance(module, Attention):
            groups += [[module.q_proj, module.k_proj, module.v_proj]]
        elif isinstance(module, MLP):
            groups += [[module.gate_proj, module.up_proj]]
    joint = [cast(list[BitLinear], group) for group in groups if are_alike(group) and type(group[0]) is BitLinear]
    together = {layer for group in joint for layer in group}
    alone = [layer for layer in network.modules() if isinstance(layer, BitLinear) and layer not in together]
    return [*joint, *([layer] for layer in alone)]


class DecoderLayer(nn.Module):
    """A decoder layer is attention and feed-forward, each added to its input; x (B, T, D) -> (B, T, D).

    The embedding x0, (B, T, D), is read where the layer has an `x0_scale`, and the token ids where it has a value
    embedding.
    """

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.residual_scale = nn.Parameter(torch.ones(1)) if config.residual_scales else None
        self.x0_scale = nn.Parameter(torch.zeros(1)) if config.x0_scales else None
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def _scaled_input(self, x_BTD: Tensor, x0_BTD: Tensor | None) -> Tensor:
        """Return r * x + s * x0, as far as the layer has the two scales."""
        if self.residual_scale is not None:
            x_BTD = self.residual_scale * x_BTD
        if self.x0_scale is not None:
            assert x0_BTD is not None
            x_BTD = x_BTD + self.x0_scale * x0_BTD
        return x_BTD

    def _by_kernels(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor | None:
        """Return the output where kernels compute the layer as a whole, otherwise None."""
        attention, mlp = self.self_attn, self.mlp
        if cache is not None or type(attention) is not Attention or type(mlp) is not MLP:
            return None
        if not attention.is_plain() or (self.dropout.p and self.training):
            return None
        if not are_unobserved([attention, mlp, self.dropout]):
            return None
        norms = [self.input_layernorm, attention.attn_sub_norm, self.post_attention_layernorm, mlp.ffn_sub_norm]
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        if (kernels := joint_kernels(x_BTD, [*norms, attention.q_norm, attention.k_norm], linears)) is None:
            return None
        layers = cast(list[BitLinear], linears)
        return kernels.decoder_layer(x_BTD, [as_norm(norm) for norm in norms], layers, mlp.hidden_act, cos, sin)

    def projected_heads(self, x_BTD: Tensor, x0_BTD: Tensor | None) -> tuple[Tensor, ...]:
        """Return queries, keys and values of the layer's input before they are rotated, each (B, T, heads * P).

        Norms of queries and keys, and value embeddings, come later.
        """
        attention, x_BTD = self.self_attn, self._scaled_input(x_BTD, x0_BTD)
        heads = normed_linears(x_BTD, self.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        return tuple(x.contiguous() for x in heads)  # kernels return parts of one tensor; FSDP's hooks need whole ones

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        x0_BTD: Tensor | None = None,
        ids_BT: Tensor | None = None,
    ) -> Tensor:
        x_BTD = self._scaled_input(x_BTD, x0_BTD)
        if (y_BTD := self._by_kernels(x_BTD, cos, sin, cache)) is not None:
            return y_BTD
        x_BTD = x_BTD + self.dropout(self.self_attn(x_BTD, self.input_layernorm, cos, sin, cache, ids_BT))
        x_BTD = x_BTD + self.dropout(self.mlp(x_BTD, self.post_attention_layernorm))
        return x_BTD
