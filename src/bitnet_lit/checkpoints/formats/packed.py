"""The packed model folder holds codes and scales, which can be run but not trained.

Everything else is as in the latent folder. A ternary code takes two bits, in Hugging Face's layout (quant/packing.py);
other codes take a byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet_lit.checkpoints.formats.format import FLOAT_ERRORS, FORMATS, WrittenTensor, scheme_problems
from bitnet_lit.checkpoints.formats.huggingface import transformers_problems
from bitnet_lit.checkpoints.formats.model_folder import ModelFolder, describe
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import ModelConfig, QuantConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bitnet_lit.checkpoints.safetensors_writer import LazyTensor

SCALE_ERROR = 2.0**-23  # two roundings of a float32: the inverse may be stored


@FORMATS.register
@dataclass(frozen=True)
class Packed(ModelFolder):
    """Writes the model folder with packed codes; the scheme must consist of codes and scales."""

    name = "packed"
    title = "the model folder, packed codes"

    def problems(self, config: ModelConfig, quant: QuantConfig) -> list[str]:
        """List why a packed folder cannot hold a model."""
        found, scheme = [*scheme_problems(quant), *super().problems(config, quant)], quant.scheme
        if not scheme.quantizes:
            found.append(
                f"quant={scheme.name}: a dense model has no codes to pack: take format=latent, or train with quant=b158"
            )
        if scheme.codes_per_byte > 1:
            rows = {
                "model.hidden_size": config.hidden_size,
                "model.intermediate_size": config.intermediate_size,
                "num_attention_heads * head_dim": config.attention_size,
                "num_key_value_heads * head_dim": config.kv_size,
            }
            found += [
                f"{key}={size}: four rows share a byte: take format=latent, or train with a multiple of 4"
                for key, size in rows.items()
                if size % scheme.codes_per_byte
            ]
        if config.qkv_bias and scheme.quantizes:
            found.append(
                "model.qkv_bias=true: transformers multiplies the bias by the scale of packed codes too: take "
                "format=latent"
            )
        return found

    def tool_problems(self, config: ModelConfig, quant: QuantConfig) -> list[str]:
        """List why unmodified `transformers` cannot compute the model; it refuses such a folder."""
        return transformers_problems(config, quant, packed=True)

    def write(self, stored: StoredModel, out: Path) -> list[WrittenTensor]:
        import torch

        from bitnet_lit.checkpoints.formats.model_folder_writer import write_export

        tensors = list(packed_tensors(stored, getattr(torch, self.dtype)))
        described = describe(stored.config, stored.quant, stored.tokenizer, stored.info, True, self.dtype)
        write_export(out, described, tensors, stored.tokenizer)
        kinds = {torch.float32: "f32", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int8: "i8"}
        written = {tensor.name: tensor for tensor in tensors}
        rows = []
        for name, shape in stored.tensors.items():
            if name in stored.folded:
                continue
            kind = kinds[written[name].dtype]
            nbytes = sum(written[each].nbytes for each in (name, f"{name}_scale") if each in written)
            rows.append(WrittenTensor(name, kind, shape, nbytes, FLOAT_ERRORS.get(kind, SCALE_ERROR)))
        return rows


def packed_tensors(stored: StoredModel, dtype: torch.dtype) -> Iterator[LazyTensor]:
    """Yield the tensors of a packed folder: codes in the layout of quant/packing.py, scales, and dense tensors.

    Scales are float32 (1,), (O, 1) or (O, G). Dense tensors are in `dtype`.
    """
    import torch

    from bitnet_lit.checkpoints.safetensors_writer import LazyTensor

    scheme = stored.quant.scheme
    for name, shape in stored.tensors.items():
        if name in stored.folded:
            continue
        if name not in stored.quantized:
            yield LazyTensor(name, shape, dtype, partial(stored.tensor, name))
            continue

        def codes(name: str = name) -> Tensor:
            return stored.packed_codes(name)[0]

        scales = scheme.granularity.scale_shape(shape[0], shape[1]) or (1,)

        def scale(name: str = name, scales: tuple[int, ...] = scales) -> Tensor:
            return stored.codes(name)[1].reshape(scales)

        dtype_of_codes = torch.uint8 if scheme.codes_per_byte > 1 else torch.int8
        yield LazyTensor(name, (shape[0] // scheme.codes_per_byte, shape[1]), dtype_of_codes, codes)
        yield LazyTensor(f"{name}_scale", scales, torch.float32, scale)
