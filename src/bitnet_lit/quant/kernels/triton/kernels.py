"""`TritonKernels` says which layers the Triton kernels compute, and calls them."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitnet_lit.quant.activations import AbsMax
from bitnet_lit.quant.kernels.interface import Kernels, Norm, compute_dtype
from bitnet_lit.quant.three_of_four import ThreeOfFour
from bitnet_lit.quant.weights import AbsMean, AbsMedian, PerRow, PerTensor, Sign, WeightRule

if TYPE_CHECKING:
    from bitnet_lit.quant.bit_linear import BitLinear
    from bitnet_lit.quant.kernels.triton.functions import RoundedWeights, Rounding

HAS_TRITON = find_spec("triton") is not None


def _build_refusal() -> str | None:
    """Return why Triton cannot compile the C function that launches a kernel; None where it has all that it needs.

    The places are those in which triton/runtime/build.py looks.
    """
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler, and there is neither gcc nor clang"
    scheme = sysconfig.get_default_scheme()
    # Debian's Python has a scheme for what is installed beside its own packages; its headers are not there.
    folder = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
    is_elsewhere = any(os.environ.get(name) for name in ("CPATH", "C_INCLUDE_PATH"))
    if not (folder / "Python.h").exists() and not is_elsewhere:
        return f"Triton needs Python.h, which is not in {folder} (on Debian and Ubuntu, install python3-dev)"
    return None


BUILD_REFUSAL = _build_refusal() if HAS_TRITON else None
"""It is a constant, because torch.compile traces `computes` and cannot look into folders."""
ALIGNMENT = 16
"""Bytes at whose multiples the TMA needs each row of a matrix to start."""
FP8_FROM, FP8_ALL_FROM = 256, 512
"""The smaller side of a matrix from which on `quant.grad=auto` rounds output gradients to FP8 for the gradient of the
input, and for that of the weights too. Below, rounding takes longer than the faster product saves."""


def device_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why no kernel of this folder runs on a CUDA device with tensors of `dtype`; None where they run."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if BUILD_REFUSAL is not None:
        return BUILD_REFUSAL
    if torch.version.hip is not None:
        return "the kernels are for GPUs of NVIDIA"
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major != 9:
        return f"compute capability {gpu.major}.{gpu.minor}, and the kernels are for 9.0 (Hopper)"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {dtype}"
    return None


def computes(x: Tensor, kernel: str) -> bool:
    """Return whether a kernel of this folder may compute a part of a network that is not quantized.

    Args:
        x: the input of that part.
        kernel: the run's `quant.kernel`.
    """
    is_asked = kernel in ("auto", TritonKernels.name)
    return is_asked and x.is_cuda and x.numel() > 0 and device_refusal(x.device, x.dtype) is None


def _rule_name(rule: WeightRule | None) -> str | None:
    """Return the name of a rule that the kernels support, a key of `weights.RULES`; None for any other rule."""
    if type(rule) is Sign:
        return "sign"
    if type(rule) is ThreeOfFour:
        return "three_of_four"
    for kind, name in ((AbsMean, "absmean"), (AbsMedian, "absmedian")):
        if type(rule) is kind and rule.granularity == PerTensor():
            return name
        if type(rule) is kind and rule.granularity == PerRow():
            return f"{name}_row"
    return None


def _grad(layer: BitLinear, dtype: torch.dtype) -> str:
    """Return how the gradients of a layer are computed: bf16, fp8 or fp8_all, as `quant.grad` describes them."""
    if dtype != torch.bfloat16:
        return "bf16"  # in `dtype`
    if layer.grad != "auto":
        return layer.grad
    size = min(layer.in_features, layer.out_features)
    return "fp8_all" if size >= FP8_ALL_FROM else "fp8" if size >= FP8_FROM else "bf16"


def _count(number: int, layers: Sequence[BitLinear]) -> str:
    return "" if number == len(layers) else f" ({number} layers)"


def _held(layers: Sequence[BitLinear]) -> RoundedWeights | None:
    """Return the weights that are held for these layers together, or None if there are none."""
    held: RoundedWeights | None = layers[0].held
    return None if held is None or held.codes.shape[0] != sum(layer.out_features for layer in layers) else held


class TritonKernels(Kernels):
    """The kernels of this folder. They support all built-in rules, with one scale for a matrix or for each row."""

    name = "triton"

    def refusal(self, layers: Sequence[BitLinear], device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernels`."""
        if (reason := device_refusal(device, dtype)) is not None:
            return reason
        for layer in layers:
            if type(layer._activations) is not AbsMax:
                return f"activations are rounded by {type(layer._activations).__name__}"
            if layer._weights is None:
                return "nothing is rounded"
            if _rule_name(layer._weights) is None:
                if layer._weights.granularity not in (PerTensor(), PerRow()):
                    return f"scales: {layer._weights.granularity}"
                return f"weights are rounded by {type(layer._weights).__name__}"
            if layer.in_features % ALIGNMENT or layer.out_features % ALIGNMENT:
                return f"{layer.in_features} x {layer.out_features} features are no multiples of {ALIGNMENT}"
        return None

    def note(self, layers: Sequence[BitLinear], dtype: torch.dtype) -> str | None:
        """See `Kernels`."""
        grads = [_grad(layer, dtype) for layer in layers]
        inputs, weights = sum(grad != "bf16" for grad in grads), grads.count("fp8_all")
        if inputs == 0:
            return None
        if weights == 0:
            return "gradients of the inputs in FP8" + _count(inputs, layers)
        if weights == inputs:
            return "gradients of the inputs and of the weights in FP8" + _count(inputs, layers)
        return f"gradients in FP8: of the inputs{_count(inputs, layers)}, of the weights{_count(weights, layers)}"

    def _rounding(self, layer: BitLinear, dtype: torch.dtype) -> Rounding:
        from bitnet_lit.quant.kernels.triton.functions import Rounding

        rule, grad = _rule_name(layer._weights), _grad(layer, dtype)
        assert rule is not None  # `refusal` has seen to that
        return Rounding(rule, layer._activations.bits, dtype, grad != "bf16", grad == "fp8_all")

    def hold(self, layers: Sequence[BitLinear], dtype: torch.dtype, before: RoundedWeights | None) -> RoundedWeights:
        """See `Kernels`."""
        from bitnet_lit.quant.kernels.triton.functions import RoundedWeights
        from bitnet_lit.quant.kernels.triton.weights import round_into, round_weights

        rounding, weights = self._rounding(layers[0], dtype), [layer.weight.detach() for layer in layers]
        if before is None:
            return RoundedWeights(*round_weights(weights, rounding.rule, rounding.fp8))
        codes, transposed, scale = before
        round_into(weights, rounding.rule, codes, transposed if rounding.fp8 else None, scale)
        return before

    def normed_linears(self, x: Tensor, norm: Norm | None, layers: Sequence[BitLinear]) -> tuple[Tensor, ...]:
        """See `Kernels`."""
        from bitnet_lit.quant.kernels.triton.functions import NormedLinearsFunction

        weight, eps = (None, 0.0) if norm is None else norm
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        joint = NormedLinearsFunction.apply(
            flat,
            weight,
            eps,
            self._rounding(layers[0], compute_dtype(x)),
            _held(layers),
            *(layer.weight for layer in layers),
        )
        outputs = joint.unflatten(0, x.shape[:-1]).split([layer.out_features for layer in layers], dim=-1)
        return tuple(y if layer.bias is None else y + layer.bias for y, layer in zip(outputs, layers, strict=True))

    def rotated_heads(
        self, x: Tensor, norm: Norm | None, qkv: Sequence[BitLinear], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `Kernels`."""
        from bitnet_lit.quant.kernels.triton.functions import RotatedHeadsFunction

        if any(layer._parameters["bias"] is not None for layer in qkv):
            return None
        weight, eps = (None, 0.0) if norm is None else norm
        q, k, v = RotatedHeadsFunction.apply(
            x.reshape(-1, x.shape[-1]).contiguous(),
            weight,
            eps,
            self._rounding(qkv[0], compute_dtype(x)),
            _held(qkv),
            cos.contiguous(),
            sin.contiguous(),
            *(layer.weight for layer in qkv),
        )
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def gated_mlp(
        self,
        x: Tensor,
        norm: Norm | None,
        gate_up: Sequence[BitLinear],
        activation: str,
        sub_norm: Norm | None,
        down: BitLinear,
    ) -> Tensor | None:
        """See `Kernels`."""
        from bitnet_lit.quant.kernels.triton.functions import GatedMLPFunction

        gate, up = gate_up
        if any(layer._parameters["bias"] is not None for layer in (gate, up, down)):
            return None
        weight, eps = (None, 0.0) if norm is None else norm
        sub_weight, sub_eps = (None, 0.0) if sub_norm is None else sub_norm
        y: Tensor = GatedMLPFunction.apply(
            x.reshape(-1, x.shape[-1]).contiguous(),
            weight,
            eps,
            activation,
            sub_weight,
            sub_eps,
            self._rounding(gate, compute_dtype(x)),
            _held([gate, up]),
            _held([down]),
            *(gate.weight, up.weight, down.weight),
        )
        output: Tensor = y.unflatten(0, x.shape[:-1])
        return output
