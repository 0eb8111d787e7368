"""The latent model folder holds full-precision weights, from which training can continue.

Rounding to bfloat16 keeps every code: where it would change a code, the weight is set to a nearby number instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet_lit.checkpoints.formats.format import FLOAT_ERRORS, FORMATS, WrittenTensor
from bitnet_lit.checkpoints.formats.huggingface import transformers_problems
from bitnet_lit.checkpoints.formats.model_folder import ModelFolder, describe
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.quant.weights import WeightRule, spread_scale

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bitnet_lit.checkpoints.safetensors_writer import LazyTensor

MAX_ROUNDS = 20


@FORMATS.register
@dataclass(frozen=True)
class Latent(ModelFolder):
    """Writes the model folder as training does; it holds every network and every scheme."""

    name = "latent"
    title = "the model folder, full precision"
    aliases = ("hf",)  # the older name in export.targets

    @property
    def suffix(self) -> str:
        """The dtype of the weights."""
        return self.dtype

    def tool_problems(self, config: ModelConfig, quant: QuantConfig) -> list[str]:
        """List why unmodified `transformers` cannot compute the model; it refuses such a folder."""
        return transformers_problems(config, quant, packed=False)

    def write(self, stored: StoredModel, out: Path) -> list[WrittenTensor]:
        """Write the folder, one tensor in memory at a time.

        Raises:
            UserError: the model has packed codes, so there are no latent weights to write.
        """
        import torch

        from bitnet_lit.checkpoints.formats.model_folder_writer import statistics_metadata, write_export

        tensors = list(latent_tensors(stored, getattr(torch, self.dtype)))
        is_exact = self.dtype == "float32"
        metadata = statistics_metadata(stored.quantized, stored.tensor, stored.quant) if is_exact else {}
        described = describe(stored.config, stored.quant, stored.tokenizer, stored.info, False, self.dtype)
        write_export(out, described, tensors, stored.tokenizer, metadata)
        kinds = {torch.float32: "f32", torch.bfloat16: "bf16"}
        # Rounding to bfloat16 keeps the codes but changes the scale, the mean or median of the rounded weights.
        return [WrittenTensor(t.name, kinds[t.dtype], t.shape, t.nbytes, FLOAT_ERRORS[kinds[t.dtype]]) for t in tensors]


def round_keeping_codes(weight: Tensor, rule: WeightRule) -> Tensor:
    """Round latent weights to bfloat16 without changing their codes.

    Rounding changes a weight by up to 1/256 of its value, and so the scale too. The code of a weight near the boundary
    between two codes can change. Such a weight is moved back to its side of the boundary: to the next bfloat16 number,
    or by a small part of the scale where that is farther. The boundary of b1 is 0, where bfloat16 numbers are dense.

    Args:
        weight: latent weights, float32 (O, I).

    Returns:
        bfloat16 (O, I).

    Raises:
        UserError: no such numbers were found.
    """
    import torch

    codes, scale = rule.quantize(weight)
    step = spread_scale(scale, weight.shape[1]) * 2.0**-10
    rounded = weight.bfloat16()
    for _ in range(MAX_ROUNDS):
        differing = codes - rule.quantize(rounded)[0]
        if not differing.any():
            return rounded
        up, down = torch.tensor(torch.inf, dtype=rounded.dtype), torch.tensor(-torch.inf, dtype=rounded.dtype)
        higher = rounded.nextafter(up).maximum((rounded + step).bfloat16())
        lower = rounded.nextafter(down).minimum((rounded - step).bfloat16())
        rounded = torch.where(differing > 0, higher, torch.where(differing < 0, lower, rounded))
    raise UserError("dtype=bfloat16: rounding would change codes of this model: export it as float32")


def latent_tensors(stored: StoredModel, dtype: torch.dtype) -> Iterator[LazyTensor]:
    """Yield the latent and the dense weights of a model in `dtype`.

    Raises:
        UserError: the model has packed codes, and so no latent weights.
    """
    import torch

    from bitnet_lit.checkpoints.safetensors_writer import LazyTensor

    if stored.packed:
        raise UserError(f"{stored.path}: packed codes have no latent weights: export the folder that was trained")
    for name, shape in stored.tensors.items():
        if name in stored.quantized and dtype == torch.bfloat16:

            def rounded(name: str = name) -> Tensor:
                return round_keeping_codes(stored.tensor(name), stored.rule(name))

            yield LazyTensor(name, shape, dtype, rounded)
        else:
            kept = torch.float32 if name in stored.folded else dtype  # a factor of every scale
            yield LazyTensor(name, shape, kept, partial(stored.tensor, name))
