"""Kernels for the CPU: the C++ of native/, for quantized layers and for their dense twin.

They compute in float32 and are for whole batches: packing the weights at each call pays only where there are many
tokens. So they compute training steps, and the losses of validation and evaluation. The reference computes what else
needs no gradient, as logits and generated texts.

Training compiles them. An evaluation takes them where they are compiled already, which they are after a run on this
machine. So it never waits for a compiler, and a model's loss has the same bits in the run that trained it and in later
processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from bitnet_lit.quant.kernels.interface import Kernels, Norm, measures_losses


@cache
def _missing() -> str | None:
    """Return why the compiled functions cannot be used, or None."""
    from bitnet_lit.native.build import NoCompilerError
    from bitnet_lit.native.library import functions

    try:
        functions()
    except NoCompilerError as error:
        return str(error)
    return None


@cache
def _kept() -> bool:
    from bitnet_lit.native.build import is_kept
    from bitnet_lit.native.library import TRAINING

    return is_kept(TRAINING)


def _unused_without_gradient() -> str | None:
    """Return why what needs no gradient is left to the reference, or None."""
    if not measures_losses():
        return "nothing is trained"
    return None if _missing.cache_info().currsize or _kept() else "nothing has been trained on this machine"


def _with_biases(outputs: Sequence[Tensor], layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    return tuple(y if layer.bias is None else y + layer.bias for y, layer in zip(outputs, layers, strict=True))


def _are_tokens(targets: Tensor, vocabulary: int) -> bool:
    """Return whether the C++ may read the logits of these targets. PyTorch leaves -100 out, and refuses others."""
    if targets.dtype != torch.int64 or not targets.numel():
        return False
    lowest, largest = targets.aminmax()
    return int(lowest) >= 0 and int(largest) < vocabulary


class CpuKernels(Kernels):
    """Kernels for float32 on the CPU. Each method is described by `Kernels`."""

    name = "native"
    takes_dense = True
    takes_single = False  # the gain is small there, and gradients keep the bits of the reference
    is_traceable = False

    def refusal(self, layers: Sequence[nn.Linear], device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernels`."""
        if dtype != torch.float32:
            return f"{dtype} instead of float32"
        if not torch.is_grad_enabled() and (reason := _unused_without_gradient()) is not None:
            return reason
        from bitnet_lit.native.projections import unsupported

        return unsupported(layers) or _missing()

    def multiplied_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See `Kernels`. AMX multiplies the codes of a BitNet, and the parts of float32 numbers, in bfloat16."""
        from bitnet_lit.native.library import has_amx

        return torch.bfloat16 if has_amx() else dtype

    def normed_linears(self, x: Tensor, norm: Norm | None, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
        """See `Kernels`."""
        from bitnet_lit.native.linears import normed_linears

        gain, eps = (None, 0.0) if norm is None else norm
        return _with_biases(normed_linears(x, gain, eps, layers), layers)

    def gated_mlp(
        self,
        x: Tensor,
        norm: Norm | None,
        gate_up: Sequence[nn.Linear],
        activation: str,
        sub_norm: Norm | None,
        down: nn.Linear,
    ) -> Tensor | None:
        """See `Kernels`."""
        from bitnet_lit.native.gated_mlp import gated_mlp

        layers = [*gate_up, down]
        if any(layer.bias is not None for layer in layers):
            return None
        gain, eps = (None, 0.0) if norm is None else norm
        sub_gain, sub_eps = (None, 0.0) if sub_norm is None else sub_norm
        return gated_mlp(x, gain, sub_gain, (eps, sub_eps), activation == "relu2", layers)

    def self_attention(
        self, x: Tensor, norm: Norm | None, qkv: Sequence[nn.Linear], cos: Tensor, sin: Tensor
    ) -> Tensor | None:
        """See `Kernels`."""
        from bitnet_lit.native.attention import rotary_attention

        q, k, v = self.normed_linears(x, norm, qkv)
        return rotary_attention(q, k, v, cos, sin)

    def decoder_layer(
        self,
        x: Tensor,
        norms: Sequence[Norm | None],
        linears: Sequence[nn.Linear],
        activation: str,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor | None:
        """See `Kernels`."""
        from bitnet_lit.native.decoder_layer import decoder_layer

        if any(layer.bias is not None for layer in linears):
            return None
        gains, eps = zip(*[(None, 0.0) if norm is None else norm for norm in norms], strict=True)
        return decoder_layer(x, cos, sin, gains, eps, activation == "relu2", linears)

    def next_token_loss(self, x: Tensor, norm: Norm, head: nn.Linear, targets: Tensor) -> Tensor | None:
        """See `Kernels`."""
        from bitnet_lit.native.loss import next_token_loss

        if not _are_tokens(targets, len(head.weight)):
            return None
        return next_token_loss(x, norm.weight, norm.eps, head.weight, targets) if head.bias is None else None
