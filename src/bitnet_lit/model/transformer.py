"""The decoder: embedding, layers, norm, head; and how it is built.

Modules carry Hugging Face's names (`model.layers.0.self_attn.q_proj`, ...), so a state dict needs no name map to be
read by `transformers`. Building is two steps: the dense network, then the quantization pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.model.kv_cache import KVCache
from bitnet_lit.model.layers import DecoderLayer, RMSNorm, rotary_tables
from bitnet_lit.quant import convert_linears


class Decoder(nn.Module):
    """Token ids (B, T) to hidden states (B, T, D); Hugging Face's `BitNetModel`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = config.gradient_checkpointing
        # On the meta device there is nothing to compute, and computing there imports sympy and torch._dynamo: a second
        # of start-up.
        weight = torch.empty(config.vocabulary, config.hidden_size)
        self.embed_tokens = nn.Embedding(
            config.vocabulary, config.hidden_size, _weight=weight if weight.is_meta else None
        )
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.config = config
        self.reset_rotary()

    def reset_rotary(self) -> None:
        """Compute the position tables: they are no part of the state dict, so loading asks for them again."""
        if self.embed_tokens.weight.is_meta:
            cos = sin = torch.empty(self.config.max_position_embeddings, self.config.head_size, device="meta")
        else:
            cos, sin = rotary_tables(self.config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        past = 0 if cache is None else cache.length
        end = past + ids.shape[1]
        if end > self.cos.shape[0]:
            raise ValueError(f"{end} positions, but the model's context is {self.cos.shape[0]}")
        cos, sin = self.cos[past:end], self.sin[past:end]
        x_BTD = self.dropout(self.embed_tokens(ids))
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x_BTD = checkpoint(layer, x_BTD, cos, sin, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, cos, sin, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        output: Tensor = self.norm(x_BTD)
        return output


class CausalLM(nn.Module):
    """Token ids to logits; Hugging Face's `BitNetForCausalLM` (or `LlamaForCausalLM` without sub-norms)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocabulary, bias=False)
        self.reset_parameters()
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make lm_head and embed_tokens one parameter where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_parameters(self) -> None:
        """Normal(0, initializer_range); the two projections that write to the residual stream / sqrt(2 * layers).

        GPT-2's rule, which llama2.c uses too: the sum over 2 * layers branches keeps the variance of one. For a
        ternary matrix only the scale remembers it, which is where it is needed.
        """
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            if parameter.ndim < 2 or parameter.is_meta:
                continue  # norm weights start at one; a meta parameter has no values
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=std / (2 * self.config.num_hidden_layers) ** 0.5 if residual else std)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of every position.

        Args:
            ids: int64 (B, T).
            cache: the past; filled with these T positions. None: `ids` start at position 0.

        Returns:
            (B, T, V) in the compute dtype.

        Raises:
            ValueError: more positions than the context.
        """
        logits: Tensor = self.lm_head(self.model(ids, cache))
        return logits


def next_token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats, computed in float32; logits (B, T, V), targets int64 (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


def build_model(config: ModelConfig, quant: QuantConfig, device: torch.device | str | None = None) -> CausalLM:
    """The network of `config` with the quantization pass `quant` applied.

    Args:
        device: where the parameters are made; "meta" makes none (for counting and for loading).
    """
    with torch.device(device or "cpu"):
        model = CausalLM(config)
    convert_linears(model, quant)
    return model
