"""The decoder has an embedding, decoder layers, a final norm and an output head.

Modules have Hugging Face's names (`model.layers.0.self_attn.q_proj`, ...), so `transformers` reads a state dict without
a map of names. `build_model` makes the dense network first, and then applies the quantization pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.model.kv_cache import KVCache
from bitnet_lit.model.layers import DecoderLayer, rotary_tables
from bitnet_lit.model.loss import (
    SoftmaxGradient,
    TokenLosses,
    linear_cross_entropy,
    linear_token_losses,
    next_token_loss,
)
from bitnet_lit.model.normed_linears import RMSNorm
from bitnet_lit.quant import BitLinear, convert_linears
from bitnet_lit.quant.kernels.choose import are_unobserved, chosen
from bitnet_lit.quant.kernels.interface import Kernels, Norm, measuring_losses


class Decoder(nn.Module):
    """The decoder maps token ids (B, T) to hidden states (B, T, D), like Hugging Face's `BitNetModel`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = config.gradient_checkpointing
        # nn.Embedding fills its weight. On the meta device there is nothing to fill, and doing so would import sympy
        # and torch._dynamo, which takes a second. A weight that is given is not filled.
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
        """Compute the tables of the rotary embedding.

        The state dict does not hold them. Call this after a model that was built on the meta device is loaded.
        """
        if self.embed_tokens.weight.is_meta:
            cos = sin = torch.empty(self.config.max_position_embeddings, self.config.head_size, device="meta")
        else:
            cos, sin = rotary_tables(self.config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        output: Tensor = self.norm(self.last_layer(ids, cache))
        return output

    def last_layer(
        self, ids: Tensor, cache: KVCache | None = None, inputs: dict[int, tuple[Tensor, Tensor | None]] | None = None
    ) -> Tensor:
        """Return what the last layer puts out, (B, T, D), before the final norm.

        Args:
            inputs: for each layer that is a key, it gets the arguments of the layer's `projected_heads`.
        """
        past = 0 if cache is None else cache.length
        end = past + ids.shape[1]
        if end > self.cos.shape[0]:
            raise ValueError(f"{end} positions, but the model's context is {self.cos.shape[0]}")
        cos, sin = self.cos[past:end], self.sin[past:end]
        x_BTD: Tensor = self.dropout(self.embed_tokens(ids))
        x0_BTD = x_BTD if self.config.x0_scales else None  # None, so that it is not kept where no layer reads it
        ids_BT = ids if self.config.value_embeddings else None
        for number, layer in enumerate(self.layers):
            if inputs is not None and number in inputs:
                inputs[number] = (x_BTD, x0_BTD)
            if self.gradient_checkpointing and self.training:
                x_BTD = checkpoint(layer, x_BTD, cos, sin, None, x0_BTD, ids_BT, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, cos, sin, cache, x0_BTD, ids_BT)
        if cache is not None:
            cache.advance(ids.shape[1])
        return x_BTD


class CausalLM(nn.Module):
    """A CausalLM maps token ids to logits, like Hugging Face's `BitNetForCausalLM`.

    Without sub-norms it is `LlamaForCausalLM`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocabulary, bias=False)
        self.softmax_gradient, self.token_losses = SoftmaxGradient(), TokenLosses()  # without parameters
        self.reset_parameters()
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make lm_head and embed_tokens the same parameter, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_parameters(self) -> None:
        """Draw every matrix from a normal distribution with mean 0 and standard deviation `initializer_range`.

        Biases are zero. The standard deviation of o_proj and down_proj is divided by sqrt(2 * layers), as in GPT-2 and
        llama2.c: the sum of 2 * layers residual branches then has the variance of one. In a ternary matrix this factor
        is only in the scale, and it has the same effect there.
        """
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            if parameter.ndim < 2 or parameter.is_meta or ".value_embed." in name:
                continue  # norm weights start at one, value embeddings at zero; a meta parameter has no values
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=std / (2 * self.config.num_hidden_layers) ** 0.5 if residual else std)

    def _loss_kernels(self) -> Kernels | None:
        """Return kernels that may compute the final norm, the head and the loss together, or None."""
        norm = self.model.norm
        if type(self.lm_head) is not nn.Linear or type(norm) is not RMSNorm:
            return None
        if not are_unobserved([self.model, norm, self.lm_head]):
            return None
        return chosen(cast(list[BitLinear], [self.lm_head]), self.lm_head.weight)

    def forward(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        targets: Tensor | None = None,
        per_token: bool = False,
        criterion: Callable[[CausalLM, Tensor], Tensor] | None = None,
    ) -> Any:
        """Return the logits of every position, or with `targets` the loss.

        On CUDA a loss never holds all logits (loss.py).

        Args:
            ids: int64 (B, T).
            cache: the keys and values of earlier positions; the T new ones are added to it. None: `ids` start at
                position 0.
            targets: int64 (B, T).
            per_token: return what `token_losses` returns.
            criterion: computes another loss from this network and the ids. It is called here, because FSDP gathers the
                weights for a call of the network.

        Returns:
            Logits (B, T, V), in autocast's dtype under autocast, otherwise in the dtype of the weights. With `targets`,
            the mean loss in nats, float32 ().

        Raises:
            ValueError: there are more positions than the context has.
        """
        if criterion is not None:
            return criterion(self, ids)
        if targets is not None and not per_token and (kernels := self._loss_kernels()) is not None:
            x_BTD, norm = self.model.last_layer(ids, cache), self.model.norm
            loss = kernels.next_token_loss(x_BTD, Norm(norm.weight, norm.eps), self.lm_head, targets)
            return next_token_loss(self.lm_head(norm(x_BTD)), targets) if loss is None else loss
        hidden_BTD = self.model(ids, cache)
        if targets is None:
            return self.lm_head(hidden_BTD)
        if hidden_BTD.is_cuda and type(self.lm_head) is nn.Linear:  # a quantized head has no such product
            hidden_ND, weight, flat = hidden_BTD.flatten(0, 1), self.lm_head.weight, targets.flatten()
            if per_token:
                return linear_token_losses(hidden_ND, weight, flat, self.token_losses)
            return linear_cross_entropy(hidden_ND, weight, flat, self.softmax_gradient)
        logits_BTV = self.lm_head(hidden_BTD)
        if per_token:
            return self.token_losses(logits_BTV.flatten(0, 1), targets.flatten())
        return next_token_loss(logits_BTV, targets)


def batch_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean next-token loss of a batch, in nats per token, float32 ().

    Args:
        model: a `CausalLM`, or any network of ids (B, T) -> logits (B, T, V).
        ids: int64 (B, T + 1).
    """
    if isinstance(model, CausalLM):
        loss: Tensor = model(ids[:, :-1], targets=ids[:, 1:])
        return loss
    return next_token_loss(model(ids[:, :-1]), ids[:, 1:])


def token_losses(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next-token loss of every target in nats, and whether the target had the largest logit.

    The losses are float32 (B * T,), and the hits are bool (B * T,). Neither has a gradient. The arguments are those of
    `batch_loss`.
    """
    if isinstance(model, CausalLM):
        with measuring_losses():
            found: tuple[Tensor, Tensor] = model(ids[:, :-1], targets=ids[:, 1:], per_token=True)
        return found
    return TokenLosses().forward(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def build_model(config: ModelConfig, quant: QuantConfig, device: torch.device | str | None = None) -> CausalLM:
    """Build the network of `config` and apply the quantization pass of `quant`.

    Args:
        device: the device of the parameters, by default the CPU. On "meta" they have no values, as counting and loading
            need it.

    Raises:
        UserError: `vocab_size` is None, or the group size of the scheme does not divide in_features of a projection.
    """
    with torch.device(device or "cpu"):
        model = CausalLM(config)
    convert_linears(model, quant)
    for layer in model.modules():
        if type(layer) in (nn.Linear, SoftmaxGradient):  # BitLinear has it already
            setattr(layer, "kernel", quant.kernel)  # noqa: B010  # a tensor or a module, whatever nn.Module's type says
    return model
