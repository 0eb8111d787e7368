"""The latent model folder: full-precision weights, which training can go on from.

In bfloat16 it keeps every code: a weight whose rounding would change its code moves to a number that keeps it.
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
    """The model folder as training writes it: it holds every network and every scheme."""

    name = "latent"
    title = "the model folder, full precision"
    aliases = ("hf",)  # what stock `transformers` runs: export.targets had this name for it

    @property
    def suffix(self) -> str:
        """The type of the weights."""
        return self.dtype

    def tool_problems(self, config: ModelConfig, quant: QuantConfig) -> list[str]:
        """Why stock `transformers` would compute something else, and so refuses the folder."""
        return transformers_problems(config, quant, packed=False)

    def write(self, stored: StoredModel, out: Path) -> list[WrittenTensor]:
        """See `Format`; packed codes have no latent weights to write."""
        import torch

        from bitnet_lit.checkpoints.formats.model_folder_writer import statistics_metadata, write_folder

        tensors = list(latent_tensors(stored, getattr(torch, self.dtype)))
        is_exact = self.dtype == "float32"
        metadata = statistics_metadata(stored.quantized, stored.tensor, stored.quant) if is_exact else {}
        described = describe(stored.config, stored.quant, stored.tokenizer, stored.info, False, self.dtype)
        write_folder(out, described, tensors, stored.tokenizer, metadata)
        kind = "f32" if is_exact else "bf16"
        # A latent weight in bfloat16 keeps its codes, but its scale is the mean or median of rounded numbers.
        return [WrittenTensor(t.name, kind, t.shape, t.nbytes, FLOAT_ERRORS[kind]) for t in tensors]


def round_keeping_codes(weight: Tensor, rule: WeightRule) -> Tensor:
    """bfloat16 latent weights whose codes are those of the float32 ones.

    Rounding moves a weight by up to 1/256 of itself, and the scale with it, so a weight that lies on a rounding border
    can change its code. Such weights are moved on to the next bfloat16 number on their side of the border, and near
    zero, where b1's border lies and these numbers are dense, by a small part of the scale.

    Args:
        weight: latent, float32 (O, I).

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
    """Full-precision weights in `dtype`.

    Raises:
        UserError: a packed model, which has none.
    """
    import torch

    from bitnet_lit.checkpoints.safetensors_writer import LazyTensor

    if stored.packed:
        raise UserError(f"{stored.path}: packed codes have no latent weights: export the folder that was trained")
    rule = stored.quant.scheme.weights
    for name, shape in stored.tensors.items():
        if rule is not None and name in stored.quantized and dtype == torch.bfloat16:

            def rounded(name: str = name, rule: WeightRule = rule) -> Tensor:
                return round_keeping_codes(stored.tensor(name), rule)

            yield LazyTensor(name, shape, dtype, rounded)
        else:
            yield LazyTensor(name, shape, dtype, partial(stored.tensor, name))
