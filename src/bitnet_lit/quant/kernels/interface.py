"""The interface of kernels: what they compute, and how they say what they cannot compute.

Kernels must keep to this:

- The integers of a product equal those of the reference. Only float operations may round differently.
- Parameters keep their names, and each gets a gradient of its own.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from bitnet_lit.quant.bit_linear import BitLinear


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which layers that read `x` compute their products: autocast's, or that of `x`."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


_measures_losses = ContextVar("measures_losses", default=False)


@contextlib.contextmanager
def measuring_losses() -> Iterator[None]:
    """Tell kernels that whole batches are computed for their losses alone, as in validation and evaluation."""
    token = _measures_losses.set(True)
    try:
        yield
    finally:
        _measures_losses.reset(token)


def measures_losses() -> bool:
    """Return whether `measuring_losses` is active."""
    return _measures_losses.get()


class Norm(NamedTuple):
    """An RMSNorm: x / sqrt(mean(x**2) + eps) * weight, computed in float32 and returned in the dtype of x."""

    weight: Tensor
    eps: float


class Kernels(ABC):
    """Kernels compute quantized layers on one type of device.

    Attributes:
        name: the value of `quant.kernel` that asks for them.
        takes_dense: whether they compute the layers of a dense network too. These are plain `nn.Linear`.
        takes_single: whether they compute a BitLinear that is called by itself, in a network of any kind.
        is_traceable: whether `torch.compile` can trace their calls.
    """

    name: ClassVar[str]
    takes_dense: ClassVar[bool] = False
    takes_single: ClassVar[bool] = True
    is_traceable: ClassVar[bool] = True

    @abstractmethod
    def refusal(self, layers: Sequence[BitLinear], device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why one of these layers cannot be computed, in a few words; None if all can.

        `torch.compile` traces this at each call of a layer, so it must be cheap and plain.

        Args:
            layers: layers of one scheme. Each of them can be computed together with others of which this is true.
            dtype: the dtype in which the layers return their outputs.
        """

    def note(self, layers: Sequence[BitLinear], dtype: torch.dtype) -> str | None:
        """Return what a user should know of how `layers` are computed, for the plan of a run; None: nothing."""
        return None

    def multiplied_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of what the processor multiplies, where the layers return `dtype`.

        The speed of the device in that dtype is what the speed of a run is held against (`perf/mfu`).
        """
        return dtype

    @abstractmethod
    def normed_linears(self, x: Tensor, norm: Norm | None, layers: Sequence[BitLinear]) -> tuple[Tensor, ...]:
        """Compute layer(norm(x)) of each layer, biases included.

        Args:
            x: float, (B..., I).
            norm: the norm before the layers, or None where x is their input.

        Returns:
            For each layer, (B..., O) in the dtype of the reference's output.
        """

    def rotated_heads(
        self, x: Tensor, norm: Norm | None, qkv: Sequence[BitLinear], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Compute the heads of attention: q(norm(x)) and k(norm(x)) rotated, and v(norm(x)); None: do it in parts.

        Args:
            x: float, (B, T, I).
            cos, sin: (T, head_dim); see `model.layers.apply_rotary`.

        Returns:
            Queries (B, heads, T, head_dim), keys and values (B, kv_heads, T, head_dim).
        """
        return None

    def self_attention(
        self, x: Tensor, norm: Norm | None, qkv: Sequence[BitLinear], cos: Tensor, sin: Tensor
    ) -> Tensor | None:
        """Compute causal self-attention of the heads that `rotated_heads` describes; None: do it in parts.

        Returns:
            (B, T, heads * head_dim).
        """
        return None

    def gated_mlp(
        self,
        x: Tensor,
        norm: Norm | None,
        gate_up: Sequence[BitLinear],
        activation: str,
        sub_norm: Norm | None,
        down: BitLinear,
    ) -> Tensor | None:
        """Compute down(sub_norm(activation(gate(norm(x))) * up(norm(x)))); None: do it in parts.

        Args:
            x: float, (B..., I).
            gate_up: the layers of gate and of up.
            activation: "silu" or "relu2".
        """
        return None

    def decoder_layer(
        self,
        x: Tensor,
        norms: Sequence[Norm | None],
        linears: Sequence[BitLinear],
        activation: str,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor | None:
        """Compute a whole decoder layer, without dropout: `self_attention` and its output, and `gated_mlp`, each added
        to its input; None: do it in parts.

        Args:
            x: float, (B, T, D).
            norms: those before q, before o, before gate, and before down.
            linears: q, k, v, o, gate, up, down.
            activation: "silu" or "relu2".
            cos, sin: (T, head_dim); see `model.layers.apply_rotary`.
        """
        return None

    def next_token_loss(self, x: Tensor, norm: Norm, head: nn.Linear, targets: Tensor) -> Tensor | None:
        """Compute the mean cross-entropy of head(norm(x)) in nats, float32 (); None: do it in parts.

        Args:
            x: float, (B, T, D).
            targets: int64 (B, T).
        """
        return None

    def hold(self, layers: Sequence[BitLinear], dtype: torch.dtype, before: Any) -> Any:
        """Round the weights of layers that are computed together, for several forward passes.

        Args:
            dtype: the dtype of the layers' products in these passes (autocast's).
            before: what the last call returned for these layers; its tensors are filled again. None at first.

        Returns:
            What the first of the layers has as `held` in these passes, or None where the kernels do not use it.
        """
        return None
