"""GGUF is the file of llama.cpp. It is written here from codes and scales, and read back with the `gguf` package.

TQ2_0 stores a block of 256 codes and an fp16 scale in 66 bytes, TQ1_0 in 54. The scale of a block is the largest
magnitude in it. So scales per tensor and per row fit, and scales per group if a group is a multiple of 256 inputs. The
values to quantize must be code * scale, because most latent weights would become 0. Rounding the scale to fp16 is the
only error of a projection. llama.cpp quantizes activations by blocks of 256 instead of by tokens, so its logits differ
from ours by a little more.

Which architecture a network is stored as, gguf_graph.py says. Rows whose length is not a multiple of 256 are refused;
other converters silently store them in 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitnet_lit.checkpoints.formats.format import FLOAT_ERRORS, FORMATS, Format, Tool, WrittenTensor, scheme_problems
from bitnet_lit.checkpoints.formats.gguf_graph import graph_of
from bitnet_lit.checkpoints.formats.llama_tokenizer import llama_tokenizer_problem
from bitnet_lit.checkpoints.formats.q6_k import quantize_q6_k
from bitnet_lit.checkpoints.formats.rotary_order import deinterleave, interleave
from bitnet_lit.checkpoints.stored_model import StoredModel, TensorReader
from bitnet_lit.config import ModelConfig, QuantConfig
from bitnet_lit.config.checks import one_of
from bitnet_lit.config.held import ANY, SIZES, Only
from bitnet_lit.data.tokenizers import Tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.extras import needs
from bitnet_lit.model.tensors import EMBEDDING, FINAL_NORM, HEAD, Kind, NetworkTensor, network_tensors
from bitnet_lit.quant.activations import SCALE_MIN, AbsMax
from bitnet_lit.quant.weights import Granularity, PerGroup, PerRow, PerTensor, spread_scale

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
TERNARY_BLOCK = 256
ACTIVATIONS = AbsMax(8)  # ggml's types of activations have 8 bits: vec_dot_type of its type traits
ROWS_AT_ONCE = 1024  # bounds the memory for converting a large matrix
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.attn_sub_norm.weight": "attn_sub_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.ffn_sub_norm.weight": "ffn_sub_norm.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
OTHER_NAMES = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
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
TENSOR_NAMES = {**LAYER_NAMES, **OTHER_NAMES}


def _gguf() -> Any:
    with needs("gguf", "format=gguf"):
        import gguf
    return gguf


def _their_name(tensor: NetworkTensor) -> str:
    if tensor.layer is None:
        return OTHER_NAMES[tensor.name]
    return f"blk.{tensor.layer}.{LAYER_NAMES[tensor.within]}"


def _heads(tensor: NetworkTensor, config: ModelConfig) -> int | None:
    """Return the number of heads of a tensor whose rows the graph needs in another order; None for the others."""
    return tensor.rotary_heads if graph_of(config).rotates_neighbours else None


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
            yield f"quant={scheme.name}: dense weights are not ternary codes: take type=f16, or train with quant=b158"
        if not _fills_blocks(scheme.granularity):
            yield (
                f"quant={scheme}: its scales are {scheme.granularity}, and a ternary block of {TERNARY_BLOCK} inputs "
                f"has one: take type=f16, or train with quant=b158_row or groups of a multiple of {TERNARY_BLOCK}"
            )
        rows = {"model.hidden_size": config.hidden_size, "model.intermediate_size": config.intermediate_size}
        if config.attention_size != config.hidden_size:
            rows["model.num_attention_heads * head_dim"] = config.attention_size
        for key, size in rows.items():
            if size % TERNARY_BLOCK:
                near = max(TERNARY_BLOCK, round(size / TERNARY_BLOCK) * TERNARY_BLOCK)
                yield f"{key}={size}: ternary blocks hold {TERNARY_BLOCK} inputs: take type=f16, or train with {near}"

    def tokenizer_problem(self, tokenizer: Tokenizer | None) -> str | None:
        return llama_tokenizer_problem(tokenizer)

    def write(self, stored: StoredModel, out: Path) -> list[WrittenTensor]:
        """Write the file, one tensor in memory at a time.

        Raises:
            UserError: the tokenizer is not a SentencePiece BPE, or the type of the embeddings cannot hold their rows.
        """
        gguf = _gguf()
        writer = gguf.GGUFWriter(out, graph_of(stored.config).name)
        _add_fields(writer, stored, self.type)
        tensors, rows = network_tensors(stored.config), []
        for tensor in tensors:
            shape, kind = tensor.shape, self._type_of(tensor, stored)
            quantized = gguf.GGMLQuantizationType[kind.upper()]
            block, size = gguf.GGML_QUANT_SIZES[quantized]
            if shape[-1] % block:
                raise UserError(
                    f"embeddings={self.embeddings}: stores blocks of {block}, but the rows of {tensor.name} hold "
                    f"{shape[-1]}: take embeddings=f16"
                )
            nbytes = tensor.size // block * size
            dtype = {"f32": np.float32, "f16": np.float16}.get(kind, np.uint8)
            stored_shape = shape if kind in FLOAT_ERRORS else (*shape[:-1], shape[-1] // block * size)
            writer.add_tensor_info(_their_name(tensor), stored_shape, np.dtype(dtype), nbytes, raw_dtype=quantized)
            # For a tensor that is read back as codes, the error is that of its scale, which is fp16 in all three types.
            bound = FLOAT_ERRORS["f16"] if tensor.name in stored.quantized else ERRORS[kind]
            rows.append(WrittenTensor(tensor.name, kind, shape, nbytes, bound))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, row in zip(tensors, rows, strict=True):
            writer.write_tensor_data(_bytes_of(stored, tensor, row.kind))
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


def _add_fields(writer: Any, stored: StoredModel, type: str) -> None:
    """Write the sizes of the network and the vocabulary into the file's metadata."""
    gguf, config, tokenizer = _gguf(), stored.config, stored.tokenizer
    writer.add_name(config.name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if graph_of(config).any_head_dim:
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    problem = llama_tokenizer_problem(tokenizer)
    vocabulary = None if tokenizer is None or problem else tokenizer.sentencepiece_vocabulary()
    if tokenizer is None or vocabulary is None:
        raise UserError(
            f"{stored.path}: {problem}, but a GGUF needs the vocabulary of a SentencePiece BPE: put the "
            "tokenizer.model there that it was trained with, or take format=packed"
        )
    kinds = gguf.TokenType
    tokens = [piece.text.encode() for piece in vocabulary.pieces]
    scores = [piece.score for piece in vocabulary.pieces]
    types = [kinds[piece.kind.name] for piece in vocabulary.pieces]
    for token in range(len(tokens), config.vocab_size or 0):  # an embedding with more rows than the vocabulary
        tokens.append(f"[PAD{token}]".encode())
        scores.append(-1e4)
        types.append(kinds.UNUSED)
    writer.add_tokenizer_model("llama")  # SentencePiece BPE
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_unk_token_id(max(vocabulary.unk_id, 0))
    if tokenizer.eos_id >= 0:
        writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.bos_id)  # BOS ends a text too: it separates the stories in llama2.c's shards
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.adds_space_prefix)


def _converted(values: Callable[[int, int], NDArray[np.float32]], rows: int, kind: str) -> NDArray[Any]:
    """Convert rows of float32 values to bytes of the type `kind`, ROWS_AT_ONCE at a time."""
    gguf = _gguf()
    convert = (
        quantize_q6_k if kind == "q6_k" else lambda v: gguf.quants.quantize(v, gguf.GGMLQuantizationType[kind.upper()])
    )
    return np.concatenate([convert(values(i, min(i + ROWS_AT_ONCE, rows))) for i in range(0, rows, ROWS_AT_ONCE)])


def _bytes_of(stored: StoredModel, tensor: NetworkTensor, kind: str) -> NDArray[Any]:
    """Return the bytes of a tensor as they are written."""
    heads = _heads(tensor, stored.config)
    if tensor.name not in stored.quantized:
        values = interleave(stored.tensor(tensor.name), heads)
        if values.ndim == 1:
            return values.numpy()
        return _converted(lambda i, j: values[i:j].numpy(), len(values), kind)
    codes, scale = stored.codes(tensor.name)
    scale = spread_scale(scale, codes.shape[1]).expand(codes.shape)
    codes, scale = interleave(codes, heads), interleave(scale, heads)
    return _converted(lambda i, j: (codes[i:j].float() * scale[i:j]).numpy(), len(codes), kind)


def _scales(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Compute the scales of dequantized ternary weights, float32 (O, I).

    A scale is the largest magnitude of the weights that share it, or SCALE_MIN where all of them are 0.

    Args:
        shape: the shape of the result, as the granularity gives it: (), (O, 1) or (O, G).
    """
    magnitude = values.abs()
    largest = magnitude.unflatten(1, (shape[1], -1)).amax(-1) if shape else magnitude.max()
    import torch

    return torch.where(largest > 0, largest, SCALE_MIN)


class GgufReader(TensorReader):
    """Reads the tensors of a GGUF file with the `gguf` package, under our names and with rows in our order.

    A quantized projection is given as codes and scales, computed from the dequantized values: a scale is the largest
    magnitude, and a code is the value divided by its scale.
    """

    def __init__(self, path: Path, stored: StoredModel) -> None:
        self._stored = stored
        theirs = {tensor.name: tensor for tensor in _gguf().GGUFReader(path).tensors}
        self._network = {tensor.name: tensor for tensor in network_tensors(stored.config)}
        self._tensors = {
            name: theirs[_their_name(tensor)] for name, tensor in self._network.items() if _their_name(tensor) in theirs
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in self._tensors.items():
            shapes[name] = tuple(map(int, reversed(tensor.shape)))  # GGUF gives the innermost dimension first
            if name in self._stored.quantized:
                shapes[f"{name}_scale"] = self._scale_shape(name) or (1,)
        return shapes

    def _scale_shape(self, name: str) -> tuple[int, ...]:
        rows, inputs = self._stored.tensors[name]
        return self._stored.quant.scheme.granularity.scale_shape(rows, inputs)

    def _dequantized(self, name: str) -> Tensor:
        import torch

        tensor = self._tensors[name]
        shape = tuple(map(int, reversed(tensor.shape)))
        rows = torch.empty(shape)
        data = tensor.data.reshape(shape[0], -1)  # one row of bytes for each row of values; a vector holds its values
        for start in range(0, len(data), ROWS_AT_ONCE):
            part = _gguf().quants.dequantize(data[start : start + ROWS_AT_ONCE], tensor.tensor_type)
            rows[start : start + ROWS_AT_ONCE] = torch.from_numpy(np.array(part)).reshape(-1, *shape[1:])
        return deinterleave(rows, _heads(self._network[name], self._stored.config))

    def read(self, name: str) -> NDArray[Any]:
        weight = name.removesuffix("_scale")
        values = self._dequantized(weight)
        if weight not in self._stored.quantized:
            return values.numpy()
        scales = _scales(values, self._scale_shape(weight))
        if name != weight:
            return (scales if scales.ndim else scales.reshape(1)).numpy()
        return (values / spread_scale(scales, values.shape[1])).numpy()
