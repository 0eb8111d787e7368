"""A network may begin dense, and be quantized later: at once, or little by little. Three phases follow each other.

1. Full precision, up to the optimizer step `quantization_step` of the plan (`quant.start_at`). Layers compute as
   `nn.Linear` does, with all that is fast for a dense network: its kernels, `torch.compile`, recorded CUDA graphs.
2. The warm-up of lambda (`quant.lambda_warmup_steps`): layers compute w + lambda * (round(w) - w), and so for their
   activations; lambda rises from 0 to 1.
3. Quantized.

ParetoQ (Liu et al. 2025, arXiv 2502.02631) finds the first phase worth most of the training tokens: full precision
learns faster, and the weights that it finds need only a short time to settle on codes. Parameters and the optimizer's
state stay the same tensors throughout.

Validation, samples and model folders are those of the quantized network in every phase, because it is what is shipped.
So the losses of validations can be compared over the whole run, and the best checkpoint is the best quantized model.

The phase depends only on the step, so a resumed run is in the phase in which the unbroken run would be. A run that has
begun to quantize stays quantized, also if a resume stretches its schedule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bitnet_lit.config import QuantConfig
from bitnet_lit.quant.bit_linear import BitLinear, set_strength

QUANTIZED_SINCE = "quantized_since"
"""The key of a checkpoint for the optimizer step from which the network is quantized; it has None before that step.
Runs that are quantized from the first step have no such key."""


def warmup_strength(shape: str, progress: float) -> float:
    """Return lambda, from 0 (full precision) to 1 (fully quantized).

    Args:
        shape: "linear", "cosine" or "exponential" (`quant.lambda_warmup_shape`).
        progress: the share of the warm-up that is done, in [0, 1].
    """
    if shape == "cosine":
        return (1 - math.cos(math.pi * progress)) / 2
    if shape == "exponential":  # It rises fast at first, then slowly.
        return (1 - math.exp(-5 * progress)) / (1 - math.exp(-5))
    return progress


class QuantizationStart:
    """Sets the layers of a network as an optimizer step needs them.

    A dense layer is the same object with the class `nn.Linear`: code that asks for a layer's class takes its paths for
    dense layers, and `torch.compile` has a variant for each class. Parameters, names, hooks and shards stay.

    Args:
        model: its BitLinear layers are set.
        config: says how lambda rises.
        step: the optimizer step from which the network is quantized; 0: from the first one.

    Attributes:
        step: as above. A checkpoint may change it.
        is_dense: whether the layers compute in full precision now.
        strength: lambda in the warm-up, float32 (); None in the other phases.
    """

    def __init__(self, model: nn.Module, config: QuantConfig, step: int) -> None:
        self._layers: list[tuple[nn.Linear, type[nn.Linear]]] = [
            (layer, type(layer)) for layer in model.modules() if isinstance(layer, BitLinear)
        ]
        self._model, self._config, self.step = model, config, step
        self.is_dense = False
        self.strength: Tensor | None = None

    def begin(self, step: int) -> bool:
        """Set the layers for an optimizer step; return whether it is the first one after full precision."""
        was_dense, self.is_dense = self.is_dense, step < self.step
        self._set_classes(self.is_dense)
        done, warmup = step - self.step, self._config.lambda_warmup_steps
        if 0 <= done < warmup:
            if self.strength is None:
                self.strength = torch.zeros((), device=next(self._model.parameters()).device)
                set_strength(self._model, self.strength)
            self.strength.fill_(warmup_strength(self._config.lambda_warmup_shape, done / warmup))
        elif self.strength is not None:
            self.strength = None
            set_strength(self._model, None)
        return was_dense and not self.is_dense

    def quantize(self) -> None:
        """Let the network compute fully quantized, until `go_on`."""
        self._set_classes(False)
        set_strength(self._model, None)

    def go_on(self) -> None:
        """Set the layers as they were before `quantize`."""
        set_strength(self._model, self.strength)
        self._set_classes(self.is_dense)

    def _set_classes(self, dense: bool) -> None:
        for layer, quantized in self._layers:
            wanted = nn.Linear if dense else quantized
            if type(layer) is not wanted:
                layer.__class__ = wanted
