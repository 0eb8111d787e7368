"""GGUF is the file of llama.cpp. It is written here from codes and scales, and read back with the `gguf` package.

TQ2_0 stores a block of 256 codes and an fp16 scale in 66 bytes, TQ1_0 in 54. The scale of a block is the largest
magnitude in it. So scales per tensor and per row fit, and scales per group if a group is a multiple of 256 inputs. The
values to quantize must be code * scale, because most latent weights would become 0. Rounding the scale to fp16 is the
only error of a projection. llama.cpp quantizes activations by blocks of 256 instead of by tokens, so its logits differ
from ours by a little more.

Rows whose length is not a multiple of 256 are refused; other converters silently store them in 4 bits. gguf_graph.py
says which architecture a network is stored as. gguf_metadata.py writes its sizes and its vocabulary. gguf_tensors.py
writes and reads its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bitnet_lit.checkpoints.formats.format import FLOAT_ERRORS, FORMATS, Format, Tool, WrittenTensor, scheme_problems
from bitnet_lit.checkpoints.formats.gguf_graph import graph_of
from bitnet_lit.checkpoints.formats.gguf_metadata import add_sizes, add_vocabulary
from bitnet_lit.checkpoints.formats.gguf_tensors import TENSOR_NAMES, GgufReader, their_name, written_values
from bitnet_lit.checkpoints.formats.llama_tokenizer import llama_tokenizer_problem
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.config.checks import one_of
from bitnet_lit.config.held import ANY, SIZES, Only
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.extras import needs
from bitnet_lit.model.tensors import Kind, NetworkTensor, network_tensors
from bitnet_lit.quant.activations import AbsMax
from bitnet_lit.quant.weights import Granularity, PerGroup, PerRow, PerTensor

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
TERNARY_BLOCK = 256
ACTIVATIONS = AbsMax(8)  # ggml's types of activations have 8 bits: vec_dot_type of its type traits
_TAKE_F16 = "take type=f16 (target gguf_f16)"  # a key of export, and what export.targets of a run lists
FILE_TYPES = {"tq2_0": "MOSTLY_TQ2_0", "tq1_0": "MOSTLY_TQ1_0", "f16": "MOSTLY_F16"}
# Half a step, and the rounding of the scale. Q8_0 has 127 steps and an fp16 scale. Q6_K has 32 steps, and its scales
# are rounded to 1/127 of the largest scale in the block.
ERRORS = {**FLOAT_ERRORS, "q8_0": 0.5 / 127 + 2.0**-10, "q6_k": 0.5 / 32 + 1 / 127}

HELD = {
    **SIZES,
    **dict.fromkeys(("rope_theta", "rms_norm_eps", "tie_word_embeddings", "sub_norm", "qk_norm"), ANY),
    "hidden_act": Only("silu", "llama.cpp's graph computes silu: train with model.hidden_act=silu"),
    "qkv_bias": Only(
        False, "llama.cpp's bitnet, llama and qwen3 graphs have no biases on q, k and v: train with false"
    ),
}


def _llama_cpp_logits(path: Path, ids: Tensor) -> Tensor:
    import llama_cpp
    import torch

    model = llama_cpp.Llama(str(path), n_ctx=ids.shape[1], logits_all=True, verbose=False, n_gpu_layers=0)
    model.eval(ids[0].tolist())
    return torch.tensor(model.scores[: ids.shape[1]])[None].float()


def _fills_blocks(granularity: Granularity) -> bool:
    """Return whether all weights of a ternary block share a scale."""
    if isinstance(granularity, PerGroup):
        return granularity.group_size % TERNARY_BLOCK == 0
    return granularity in (PerTensor(), PerRow())


@FORMATS.register
@dataclass(frozen=True)
class Gguf(Format):
    """Writes the GGUF file of llama.cpp."""

    name = "gguf"
    title = "llama.cpp's GGUF"
    held = HELD
    tensor_names = TENSOR_NAMES
    is_file = True
    extension = ".gguf"

    type: str = "tq2_0"
    """The type of the quantized projections: tq2_0, tq1_0 or f16. Norms are f32, dense projections f16."""
    embeddings: str = "q8_0"
    """The type of the embedding and of an untied head: q8_0, q6_k or f16."""

    def __post_init__(self) -> None:
        one_of("type", self.type, tuple(FILE_TYPES))
        one_of("embeddings", self.embeddings, ("q8_0", "q6_k", "f16"))

    @classmethod
    def targets(cls) -> tuple[Format, ...]:
        """Return one format for each type of the projections."""
        return tuple(cls(type) for type in FILE_TYPES)

    @property
    def target(self) -> str:
        """The name in export.targets: gguf_tq2_0, gguf_tq1_0 or gguf_f16."""
        return f"gguf_{self.type}"

    @property
    def suffix(self) -> str:
        """The type of the projections and the file's extension."""
        return f"{self.type}{self.extension}"

    @property
    def tool(self) -> Tool:
        """The Python package of llama.cpp."""
        return Tool("llama.cpp", ("llama_cpp",), _llama_cpp_logits)

    def problems(self, config: ModelConfig, quant: QuantConfig) -> list[str]:
        """List why llama.cpp's graphs do not compute a model, or its types cannot hold the weights."""
        found, scheme = [*scheme_problems(quant), *super().problems(config, quant)], quant.scheme
        if scheme.quantizes and not scheme.is_ternary:
            found.append(
                f"quant={scheme.name}: its codes are {', '.join(map(str, scheme.levels))}, but an exported GGUF "
                "is compared by codes -1, 0 and +1: take format=packed or llama2c"
            )
        if scheme.quantizes and scheme.activations != ACTIVATIONS:
            found.append(
                f"quant={scheme.name}: rounds activations by {scheme.activations}, and llama.cpp by {ACTIVATIONS}: "
                "take format=packed or latent, or train with quant.activation_bits=8"
            )
        if config.sub_norm and not config.tie_word_embeddings:
            found.append(
                "model.tie_word_embeddings=false: llama.cpp's bitnet graph has no head of its own: train with "
                "true, or with model.sub_norm=false"
            )
        if config.sub_norm and config.qk_norm:
            found.append(
                "model.qk_norm=true: llama.cpp's qwen3 graph has norms of queries and keys, but no sub-norms: "
                "train with false, or with model.sub_norm=false"
            )
        if config.attention_size != config.hidden_size and not graph_of(config).any_head_dim:
            found.append(f"model.head_dim={config.head_dim}: heads must add up to hidden_size: train without head_dim")
        return found if self.type == "f16" else [*found, *self._ternary_problems(config, quant)]

    def _ternary_problems(self, config: ModelConfig, quant: QuantConfig) -> Iterator[str]:
        scheme = quant.scheme
        if not scheme.quantizes:
            yield f"quant={scheme.name}: dense weights are not ternary codes: {_TAKE_F16}, or train with quant=b158"
        if not _fills_blocks(scheme.granularity):
            yield (
                f"quant={scheme}: its scales are {scheme.granularity}, and a ternary block of {TERNARY_BLOCK} inputs "
                f"has one: {_TAKE_F16}, or train with quant=b158_row or groups of a multiple of {TERNARY_BLOCK}"
            )
        rows = {"model.hidden_size": config.hidden_size, "model.intermediate_size": config.intermediate_size}
        if config.attention_size != config.hidden_size:
            rows["model.num_attention_heads * head_dim"] = config.attention_size
        for key, size in rows.items():
            if size % TERNARY_BLOCK:
                near = max(TERNARY_BLOCK, round(size / TERNARY_BLOCK) * TERNARY_BLOCK)
                yield f"{key}={size}: ternary blocks hold {TERNARY_BLOCK} inputs: {_TAKE_F16}, or train with {near}"

    def tokenizer_problem(self, tokenizer: Tokenizer | None) -> str | None:
        return llama_tokenizer_problem(tokenizer)

    def write(self, stored: StoredModel, out: Path) -> list[WrittenTensor]:
        """Write the file, one tensor in memory at a time.

        Raises:
            UserError: the tokenizer is not a SentencePiece BPE, or the type of the embeddings cannot hold their rows.
        """
        with needs("gguf", "format=gguf"):
            import gguf

        writer = gguf.GGUFWriter(out, graph_of(stored.config).name)
        writer.add_name(stored.config.name)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[self.type]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_sizes(writer, stored.config)
        add_vocabulary(writer, stored)
        tensors, rows = network_tensors(stored.config), []
        for tensor in tensors:
            *outer, inputs = tensor.shape
            kind = self._type_of(tensor, stored)
            ggml_type = gguf.GGMLQuantizationType[kind.upper()]
            block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
            if inputs % block:
                raise UserError(
                    f"embeddings={self.embeddings}: stores blocks of {block}, but the rows of {tensor.name} hold "
                    f"{inputs}: take embeddings=f16"
                )
            in_bytes = (*outer, inputs // block * block_bytes)
            nbytes = math.prod(in_bytes)
            writer.add_tensor_info(their_name(tensor), in_bytes, np.dtype(np.uint8), nbytes, raw_dtype=ggml_type)
            # For a tensor that is read back as codes, the error is that of its scale, which is fp16 in all three types.
            bound = FLOAT_ERRORS["f16"] if tensor.name in stored.quantized else ERRORS[kind]
            rows.append(WrittenTensor(tensor.name, kind, tensor.shape, nbytes, bound))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, row in zip(tensors, rows, strict=True):
            writer.write_tensor_data(written_values(stored, tensor, row.kind))
        writer.close()
        return rows

    def _type_of(self, tensor: NetworkTensor, stored: StoredModel) -> str:
        if len(tensor.shape) == 1:
            return "f32"
        if tensor.kind is Kind.EMBEDDING:
            return self.embeddings
        return self.type if tensor.name in stored.quantized else "f16"

    def reopen(self, out: Path, stored: StoredModel) -> StoredModel:
        """Open the file with the `gguf` package; sizes and scheme are those of `stored`."""
        return StoredModel(out, stored.config, stored.quant, stored.tokenizer, {}, GgufReader(out, stored))

    def recognizes(self, path: Path) -> bool:
        """Return whether the file begins with "GGUF" or is empty."""
        with path.open("rb") as file:
            return file.read(len(MAGIC)) in (MAGIC, b"")

    def next_command(self, out: Path, schemes: Sequence[str]) -> list[str]:
        """Return the command of llama.cpp."""
        return ["llama-cli", "-m", str(out), "-p", "Once upon a time"]

    def how_to_run(self, repository: str, runs_there: bool) -> Iterator[str]:
        """Yield the command for llama.cpp; this project does not run GGUF files."""
        yield f"```sh\nllama-cli -hf {repository} -p 'Once upon a time'   # llama.cpp\n```"
